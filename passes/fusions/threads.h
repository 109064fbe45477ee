// How ops share their work among threads.
//
// Many rows are shared among torch's threads, which the code compiled around the ops takes as well. Few rows, a token or a handful, are shared
// among a team of our own where the runtime asks for it (`few`). Torch's threads do nothing while one of them does what cannot be shared, between
// two ops and between two tokens, and so nor does the memory: a twelfth of a small model's token on two cores of a Zen 4. Ours ask meanwhile for
// the weights that are read next, which they know from the last token.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <array>
#include <atomic>
#include <chrono>
#include <cstdint>
#include <exception>
#include <memory>
#include <system_error>
#include <thread>
#include <utility>
#include <vector>
#ifdef __linux__
#include <pthread.h>
#endif

// Of the OpenMP that torch brings, if it has one.
extern "C" __attribute__((weak)) void omp_set_num_threads(int);

namespace oxfuse {

constexpr int64_t TEAM_ROWS = 4;  // rows that the team shares; runtime/program.py knows it

#ifdef OXFUSE_OWN_THREADS
// Threads that ThreadSanitizer follows, as it does not follow torch's pool; and as many of them as torch would at most take, however little
// there is to do, so that small inputs meet every race.
constexpr int64_t GRAIN = 1;
constexpr bool EACH_TAKES = true;  // of what threads share each has the first piece for sure, or the first one awake would take all of a small input

template <class Body>
void parallel_for(int64_t begin, int64_t end, int64_t, const Body& body) {
  const int64_t items = std::max<int64_t>(0, end - begin), parts = std::min<int64_t>(items, torch::stable::get_num_threads());
  std::vector<std::thread> threads;
  for (int64_t i = 0; i < parts; ++i)
    threads.emplace_back([&, i] { body(begin + items * i / parts, begin + items * (i + 1) / parts); });
  for (std::thread& thread : threads) thread.join();
}
#else
constexpr int64_t GRAIN = 65536;  // multiplications below which a thread is not worth waking
constexpr bool EACH_TAKES = false;

using torch::stable::parallel_for;
#endif

// What threads share reads: item i is at from + i * bytes. Without items it is known when they are shared only.
struct Reading {
  const void* from = nullptr;
  int64_t items = 0, bytes = 0;
};

// The threads of our own. They live as long as the process, and sleep when nothing has come for a while.
class Team {
 public:
  static Team& only() {
    static Team* const team = new Team;  // never deleted: its threads may outlive what is at the end of the process
    return *team;
  }

  // Calls job(thread) for 0 to `threads` - 1, for 0 here. Those that are done ask for what was read after `reading` the last time. Returns false,
  // and calls nothing, while another caller has the team, or where threads cannot be had. Throws what `job` does.
  template <class Job>
  bool run(int64_t threads, const Reading& reading, const Job& job) {
    if (busy_.exchange(true, std::memory_order_acquire)) return false;
    const struct Leave {
      std::atomic<bool>& busy;
      ~Leave() { busy.store(false, std::memory_order_release); }
    } leave{busy_};
    if (!grow(threads - 1)) return false;
    crowded_.store(threads > processors_, std::memory_order_relaxed);
    call_ = [](const void* job, int64_t thread) { (*static_cast<const Job*>(job))(thread); };
    job_ = &job;
    place_ = follow(reading, threads);
    left_.store(static_cast<int32_t>(threads - 1), std::memory_order_relaxed);
    for (int64_t i = 0; i < threads - 1; ++i) {
      helpers_[i]->calls.fetch_add(1, std::memory_order_release);
      helpers_[i]->calls.notify_one();
    }
    std::exception_ptr failure;
    try {
      job(0);
    } catch (...) {
      failure = std::current_exception();
    }
    int32_t left;
    for (int spins = 0; (left = left_.load(std::memory_order_acquire)); ++spins) {
      if (spins < PATIENCE && threads <= processors_)
        rest();
      else
        left_.wait(left, std::memory_order_acquire);
    }
    if (failed_.exchange(false, std::memory_order_relaxed)) failure = std::exchange(failure_, nullptr);
    if (failure) std::rethrow_exception(failure);
    return true;
  }

 private:
  static constexpr int PATIENCE = 16384;     // rests of a caller that waits for the others, half a millisecond
  static constexpr auto AWAKE = std::chrono::milliseconds(1);  // of a thread that has nothing to do: the time between two tokens
  static constexpr int64_t ASKED = 4 << 20;  // bytes that a thread asks for ahead: what its second cache does not hold, the third one does
  static constexpr int64_t ALL_ASKED = 32 << 20;  // of all threads

  // Something that is read, and what comes after it. Threads look at it while a caller may change it: what does not belong together asks for
  // memory that nobody needs, and to ask for it is no access.
  struct Place {
    std::atomic<const void*> from{nullptr};
    std::atomic<int64_t> items{0}, bytes{0}, threads{1};
    std::atomic<const Place*> next{nullptr};
  };
  struct alignas(64) Helper {
    std::atomic<uint32_t> calls{0};
  };

  // What a thread asks for: its parts of one place after the other, up to one that is not known yet.
  class Ahead {
   public:
    explicit Ahead(int64_t thread) : thread_(thread) {}
    // Begins after `place`, unless it did so the last time.
    void begin(const Place* place) {
      if (place == after_) return;
      after_ = place;
      asked_ = 0;
      go_on(place);
    }
    // Asks for a little more. Returns whether there is more.
    bool ask() {
      if (!place_ || asked_ >= std::min(ASKED, ALL_ASKED / threads_)) return false;
      if (at_ < end_) {
        // By eights, with a rest after each: a Zen 4 forgets what it is asked for faster than it comes.
        for (int line = 0; line < 8; ++line) __builtin_prefetch(at_ + 64 * line, 0, 2);
        at_ += 512;
        asked_ += 512;
        rest();
      } else {
        go_on(place_);
      }
      return true;
    }

   private:
    void go_on(const Place* place) {
      place_ = place ? place->next.load(std::memory_order_relaxed) : nullptr;
      if (!place_) return;
      const int64_t items = place_->items.load(std::memory_order_relaxed), bytes = place_->bytes.load(std::memory_order_relaxed);
      threads_ = place_->threads.load(std::memory_order_relaxed);
      if (!items || thread_ >= threads_) return static_cast<void>(place_ = nullptr);
      const uintptr_t from = reinterpret_cast<uintptr_t>(place_->from.load(std::memory_order_relaxed));
      at_ = reinterpret_cast<const char*>(from + items * thread_ / threads_ * bytes);
      end_ = reinterpret_cast<const char*>(from + items * (thread_ + 1) / threads_ * bytes);
    }

    const int64_t thread_;
    const Place *after_ = nullptr, *place_ = nullptr;
    const char *at_ = nullptr, *end_ = nullptr;
    int64_t asked_ = 0, threads_ = 1;
  };

  Team() {
#ifdef __linux__
    pthread_atfork(nullptr, nullptr, [] {  // a child has none of the threads
      Team& team = only();
      for (auto& helper : team.helpers_) static_cast<void>(helper.release());
      team.helpers_.clear();
      team.busy_.store(false, std::memory_order_relaxed);
    });
#endif
  }

  static void rest() {
#if defined(__x86_64__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    asm volatile("yield");
#endif
  }

  bool grow(int64_t helpers) {
    while (static_cast<int64_t>(helpers_.size()) < helpers) {
      auto helper = std::make_unique<Helper>();
      try {
        std::thread([this, helper = helper.get(), thread = static_cast<int64_t>(helpers_.size()) + 1] { serve(*helper, thread); }).detach();
      } catch (const std::system_error&) {
        return false;
      }
      helpers_.push_back(std::move(helper));
    }
    return true;
  }

  // Notes that `reading` follows the last one. Returns its place; that of the last one where nothing is read.
  const Place* follow(const Reading& reading, int64_t threads) {
    if (!reading.from) return last_;
    Place& place = places_[reinterpret_cast<uintptr_t>(reading.from) / 64 * 0x9E3779B97F4A7C15u >> 54];
    place.from.store(reading.from, std::memory_order_relaxed);
    place.items.store(reading.items, std::memory_order_relaxed);
    place.bytes.store(reading.bytes, std::memory_order_relaxed);
    place.threads.store(threads, std::memory_order_relaxed);
    if (last_) last_->next.store(&place, std::memory_order_relaxed);
    return last_ = &place;
  }

  void serve(Helper& own, int64_t thread) {
    Ahead ahead(thread);
    for (uint32_t seen = 0;; ++seen) {
      std::chrono::steady_clock::time_point asleep{};
      for (uint32_t rests = 1; own.calls.load(std::memory_order_acquire) == seen; ++rests) {
        if (crowded_.load(std::memory_order_relaxed)) {  // its processor is somebody else's, who would wait for it
          own.calls.wait(seen, std::memory_order_acquire);
          continue;
        }
        if (ahead.ask()) continue;
        rest();
        if (rests % 64) continue;
        const auto now = std::chrono::steady_clock::now();
        if (asleep == decltype(asleep){})
          asleep = now + AWAKE;
        else if (now > asleep)
          own.calls.wait(seen, std::memory_order_acquire);
      }
      try {
        call_(job_, thread);
      } catch (...) {
        if (!failed_.exchange(true, std::memory_order_relaxed)) failure_ = std::current_exception();
      }
      ahead.begin(place_);
      if (left_.fetch_sub(1, std::memory_order_release) == 1) left_.notify_one();
    }
  }

  const int64_t processors_ = std::thread::hardware_concurrency();
  std::atomic<bool> busy_{false}, crowded_{false};
  std::vector<std::unique_ptr<Helper>> helpers_;
  void (*call_)(const void*, int64_t) = nullptr;
  const void* job_ = nullptr;
  const Place* place_ = nullptr;
  Place* last_ = nullptr;
  std::array<Place, 1024> places_;
  alignas(64) std::atomic<int32_t> left_{0};  // threads that have not done the job yet
  std::atomic<bool> failed_{false};
  std::exception_ptr failure_;
};

inline thread_local int64_t few_threads = 0;  // that may share few rows of this caller; 0: torch's do

// Has few rows that are multiplied on this thread shared among `threads` of our own, 0 for torch's, and OpenMP's regions on it by `regions`.
// While ours are at work nobody else's must wait for work on their processors, as OpenMP's do for milliseconds after each region: a runtime
// calls few(threads, 1) before a step of TEAM_ROWS tokens at most, and few(0, torch's number of threads) after it.
inline void few(int64_t threads, int64_t regions) {
  few_threads = threads;
  if (omp_set_num_threads) omp_set_num_threads(static_cast<int>(regions));
}

inline int64_t few_address() { return reinterpret_cast<int64_t>(&few); }

// Threads that may share `rows` rows.
inline int64_t threads_for(int64_t rows) { return rows <= TEAM_ROWS && few_threads ? few_threads : torch::stable::get_num_threads(); }

// `parallel_for` for so many rows, by the team if they are few.
template <class Body>
void parallel_for_rows(int64_t rows, int64_t items, int64_t grain, const Body& body) {
  const int64_t threads = std::min((items + grain - 1) / grain, rows <= TEAM_ROWS ? few_threads : 0);
  if (threads > 1 && Team::only().run(threads, {}, [&](int64_t t) { body(items * t / threads, items * (t + 1) / threads); })) return;
  parallel_for(0, items, grain, body);
}

struct Range {
  int64_t begin, end;
};

// Items 0 to `items` for some threads: each begins with a part of its own, whose memory it may have asked for, and then takes ends of the others'.
class Parts {
 public:
  Parts(int64_t items, int64_t most, int64_t threads) : items_(items), most_(most), parts_(threads) {
    for (int64_t t = 0; t < threads; ++t) parts_[t].left.store(pack({own(t).begin + EACH_TAKES, own(t).end}), std::memory_order_relaxed);
  }
  Range own(int64_t thread) const {
    const int64_t threads = parts_.size();
    return {items_ * thread / threads, items_ * (thread + 1) / threads};
  }
  Range next(int64_t thread) {
    std::atomic<uint64_t>& mine = parts_[thread].left;
    for (uint64_t found = mine.load(std::memory_order_relaxed); size(found);) {
      const Range left = unpack(found), taken{left.begin, left.begin + std::clamp<int64_t>((size(found) + 1) / 2, 1, most_)};
      if (mine.compare_exchange_weak(found, pack({taken.end, left.end}), std::memory_order_relaxed)) return taken;
    }
    for (;;) {
      std::atomic<uint64_t>* largest = &mine;
      uint64_t found = 0;
      for (Part& part : parts_)
        if (const uint64_t left = part.left.load(std::memory_order_relaxed); size(left) > size(found)) largest = &part.left, found = left;
      if (!size(found)) return {items_, items_};
      const Range left = unpack(found), taken{left.end - std::clamp<int64_t>(size(found) / 2, 1, most_), left.end};
      if (largest->compare_exchange_weak(found, pack({left.begin, taken.begin}), std::memory_order_relaxed)) return taken;
    }
  }

 private:
  struct alignas(64) Part {
    std::atomic<uint64_t> left;  // its begin and its end, 32 bits each
  };
  static uint64_t pack(Range range) { return static_cast<uint64_t>(range.begin) << 32 | static_cast<uint64_t>(range.end); }
  static Range unpack(uint64_t left) { return {static_cast<int64_t>(left >> 32), static_cast<int64_t>(left & 0xffffffffu)}; }
  static int64_t size(uint64_t left) { return unpack(left).end - unpack(left).begin; }

  const int64_t items_, most_;
  std::vector<Part> parts_;
};

// Calls body(next) on threads that `work` multiplications of `rows` rows are worth. What next() returns are pieces of 0 to `items`, and then empty
// ones: whoever is free takes one, of at most `most` and of fewer the fewer are left, so that nobody waits long for a slower one.
template <class Body>
void share(int64_t rows, int64_t items, int64_t most, int64_t work, const Reading& reading, const Body& body) {
  const int64_t threads = std::min({items, 1 + work / GRAIN, threads_for(rows)});
  if (rows <= TEAM_ROWS && few_threads && threads > 1) {
    Parts parts(items, most, threads);
    const auto job = [&](int64_t thread) {
      bool first = EACH_TAKES;
      const int64_t begin = parts.own(thread).begin;
      body([&]() -> Range { return std::exchange(first, false) ? Range{begin, begin + 1} : parts.next(thread); });
    };
    if (Team::only().run(threads, reading, job)) return;
  }
  std::atomic<int64_t> taken{EACH_TAKES ? threads : 0};
  const auto next = [&]() -> Range {
    int64_t begin = taken.load(std::memory_order_relaxed), end;
    do {
      if (begin == items) return {items, items};
      end = begin + std::clamp<int64_t>((items - begin) / (2 * threads), 1, most);
    } while (!taken.compare_exchange_weak(begin, end, std::memory_order_relaxed));
    return {begin, end};
  };
  parallel_for(0, threads, 1, [&](int64_t thread, int64_t) {
    bool first = EACH_TAKES;
    body([&]() -> Range { return std::exchange(first, false) ? Range{thread, thread + 1} : next(); });
  });
}

}  // namespace oxfuse

STABLE_TORCH_LIBRARY_FRAGMENT(oxfuse, m) { m.def("few_" OXFUSE_TAG "_address() -> int"); }
STABLE_TORCH_LIBRARY_IMPL(oxfuse, CompositeExplicitAutograd, m) { m.impl("few_" OXFUSE_TAG "_address", TORCH_BOX(&oxfuse::few_address)); }
