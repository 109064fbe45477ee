// Rows of activations as kernels for panels of weights (panels.h) want them: in blocks of 32, of rows that are multiplied with the same weights
// beside each other; as they are, or rounded to whole numbers.
#pragma once

#include "ops.h"

namespace oxfuse {

constexpr int BLOCK = 32;      // values along the input that share a scale
constexpr int TALLEST = 240;   // rows that share decoded panels; their results take 30 KB

// Calls each(first, some) for runs of at most `most` of m rows, as alike as can be: a small rest would leave a processor waiting.
template <class Each>
void for_tiles(int64_t m, int64_t most, Each&& each) {
  const int64_t tiles = (m + most - 1) / most;
  for (int64_t tile = 0, first = 0; tile < tiles; ++tile) {
    const int64_t some = m / tiles + (tile < m % tiles);
    each(first, some);
    first += some;
  }
}

// Rows of activations that are multiplied with the same weights.
struct Group {
  int64_t expert, first, count;
};

// Where a block of a row of activations lies, in blocks: those of a group beside each other, [block][row of the group], so that a register tile
// of rows finds a block of all of them in one place.
struct Places {
  int64_t blocks;
  std::vector<Group> groups;
  std::vector<int64_t> group;  // of each row

  // Groups of at most TALLEST rows, as alike as can be; `begin` has the first row of each expert, and the number of all.
  Places(const std::vector<int64_t>& begin, int64_t blocks) : blocks(blocks) {
    for (int64_t e = 0; e + 1 < static_cast<int64_t>(begin.size()); ++e)
      for_tiles(begin[e + 1] - begin[e], TALLEST, [&](int64_t first, int64_t some) {
        group.insert(group.end(), some, groups.size());
        groups.push_back({e, begin[e] + first, some});
      });
  }
  int64_t of(int64_t row, int64_t block) const {
    const Group& in = groups[group[row]];
    return in.first * blocks + block * in.count + row - in.first;
  }
};

// Rows of activations as whole numbers, each block of 32 with a scale: value = number * scale. Of 8 bits, eight numbers are the values
// 0 4 1 5 2 6 3 7; of 16 bits they lie in order.
template <class Number>
struct Numbers {
  const Number* values = nullptr;
  const float* scales = nullptr;
  const int32_t* starts = nullptr;  // of 8 bits: what a block's sum begins with, see `factor` in panels.h
  explicit operator bool() const { return values; }
  Numbers at(int64_t place) const { return values ? Numbers{values + place * BLOCK, scales + place, starts + place} : Numbers{}; }
};

// Rows of activations in blocks, in every form that kernels want: float32; bfloat16 and 16 bits where the processor is fast at them; or 8 bits
// alone. `rows` are those of the group, and how far its blocks are apart.
struct Activations {
  const float* wide = nullptr;
  const bfloat16* half = nullptr;
  Numbers<int8_t> bytes;
  Numbers<int16_t> words;
  int64_t rows = 0;
  Activations at(int64_t place, int64_t count) const {
    return {wide ? wide + place * BLOCK : nullptr, half ? half + place * BLOCK : nullptr, bytes.at(place), words.at(place), count};
  }
  Activations from(int64_t row, int64_t block = 0) const { return at(block * rows + row, rows); }
};

// Blocks of activations as whole numbers, held.
template <class Number>
class RoundedBlocks {
 public:
  static constexpr float MOST = sizeof(Number) == 1 ? 127.f : 32767.f;
  explicit RoundedBlocks(int64_t blocks) : values_(buffer<Number>(blocks * BLOCK)), scales_(buffer<float>(blocks)), starts_(buffer<int32_t>(blocks)) {}

  // Rounds the block of 32 values at x by its largest value: with 8 bits what `rounded` of passes/quantise.py does. With a value that is no
  // number, or infinite, it becomes none. `factor` times the numbers' sum is what a sum of products begins with.
  void round(int64_t place, const float* x, int factor) {
    Floats largest{}, poison{};
    for (int k = 0; k < BLOCK; k += LANES) {
      const Floats value = load(x + k), size = (Floats)((Bits)value & 0x7fffffffu);
      largest = size > largest ? size : largest;
      poison += value * 0.f;
    }
    float most = 0, wrong = 0;
    for (int i = 0; i < LANES; ++i) most = std::max(most, largest[i]), wrong += poison[i];
    const bool some = most >= 0x1p-100f;  // below it the inverse may overflow, and nothing is left to say
    const float scale = some ? most / MOST : 0.f, inverse = some ? MOST / most : 0.f;
    int32_t numbers[BLOCK];
    const Floats magic = splat(12582912.f);  // 1.5 * 2^23: adding it rounds to an integer, which its low bits then hold
    Ints total{};
    for (int k = 0; k < BLOCK; k += LANES) {
      Floats product = load(x + k) * inverse;
      // Rounded before the sum, as the reference does it: no fused multiply-add here.
#ifdef __AVX2__
      asm("" : "+x"(product));
#else
      asm("" : "+m"(product));  // no register holds all of it
#endif
      const Ints value = (Ints)(product + magic) - 0x4B400000;
      total += value;
      std::memcpy(numbers + k, &value, sizeof(value));
    }
    int32_t sum = 0;
    for (int i = 0; i < LANES; ++i) sum += total[i];
    Number* to = values_.get() + place * BLOCK;
    constexpr int order[8] = {0, 4, 1, 5, 2, 6, 3, 7};
    for (int c = 0; c < BLOCK; c += 8)
#pragma GCC unroll 8
      for (int i = 0; i < 8; ++i) to[c + i] = static_cast<Number>(numbers[c + (sizeof(Number) == 1 ? order[i] : i)]);
    scales_[place] = scale + wrong;
    starts_[place] = factor * sum;
  }
  void copy(int64_t place, int64_t from) {
    std::memcpy(&values_[place * BLOCK], &values_[from * BLOCK], BLOCK * sizeof(Number));
    scales_[place] = scales_[from];
    starts_[place] = starts_[from];
  }
  Numbers<Number> numbers() const { return {values_.get(), scales_.get(), starts_.get()}; }

 private:
  Buffer<Number> values_;
  Buffer<float> scales_;
  Buffer<int32_t> starts_;
};

// Calls put(place, block) for all blocks of rows [rows, length] of x in float32, with zeros up to whole blocks.
template <class T, class Put>
void widen_blocks(const T* x, int64_t rows, int64_t length, const Places& places, const Put& put) {
  parallel_for(0, rows, 1 + GRAIN / (length + 1), [&](int64_t first, int64_t last) {
    for (int64_t row = first; row < last; ++row)
      for (int64_t b = 0; b < places.blocks; ++b) {
        alignas(64) float block[BLOCK];
        for (int k = 0; k < BLOCK; k += LANES) {
          const int64_t at = b * BLOCK + k, left = length - at;
          const T* from = x + row * length + at;
          store(block + k, left >= LANES ? load(from) : left > 0 ? load(from, left) : Floats{});
        }
        put(places.of(row, b), block);
      }
  });
}

// Returns these blocks at their places.
template <class T>
Buffer<float> widened(const T* x, int64_t rows, int64_t length, const Places& places) {
  Buffer<float> wide = buffer<float>(rows * places.blocks * BLOCK);
  widen_blocks(x, rows, length, places, [&](int64_t place, const float* block) { std::memcpy(&wide[place * BLOCK], block, BLOCK * sizeof(float)); });
  return wide;
}

}  // namespace oxfuse
