# Makes the target `oxfuse_torch`: libtorch, as CMAKE_PREFIX_PATH or Torch_DIR names it.
#
# torch's own package is asked first, but for a CUDA build: there it wants the CUDA toolkit, whose headers and compiler nothing here
# needs. Its libraries are then taken as they lie, those of CUDA included, so that they register their devices.

set(oxfuse_torch_roots ${CMAKE_PREFIX_PATH} ${Torch_DIR})
set(oxfuse_torch_root "")
foreach(place ${oxfuse_torch_roots})
  foreach(up . ../.. ../../..)  # of a libtorch archive, of torch.utils.cmake_prefix_path, of Torch_DIR
    get_filename_component(root "${place}/${up}" ABSOLUTE)
    if(NOT oxfuse_torch_root AND EXISTS "${root}/include/torch/csrc/inductor/aoti_runner/model_container_runner.h")
      set(oxfuse_torch_root "${root}")
    endif()
  endforeach()
endforeach()

option(OXFUSE_TORCH_AS_IT_LIES "Do not ask torch's own CMake package." OFF)
add_library(oxfuse_torch INTERFACE)
if(oxfuse_torch_root AND (OXFUSE_TORCH_AS_IT_LIES OR EXISTS "${oxfuse_torch_root}/lib/libtorch_cuda.so"))
  message(STATUS "Found libtorch as it lies in ${oxfuse_torch_root}")
  target_include_directories(oxfuse_torch SYSTEM INTERFACE
    ${oxfuse_torch_root}/include ${oxfuse_torch_root}/include/torch/csrc/api/include)
  foreach(name torch_cpu c10 torch_cuda c10_cuda torch)
    if(EXISTS "${oxfuse_torch_root}/lib/lib${name}.so")
      target_link_libraries(oxfuse_torch INTERFACE "-Wl,--push-state,--no-as-needed" ${oxfuse_torch_root}/lib/lib${name}.so "-Wl,--pop-state")
    endif()
  endforeach()
else()
  find_package(Torch REQUIRED)
  target_link_libraries(oxfuse_torch INTERFACE ${TORCH_LIBRARIES})
endif()
