# Compiler settings and the two functions that every folder uses: moe_library and moe_test.
set(CMAKE_CXX_STANDARD 20)
set(CMAKE_CXX_STANDARD_REQUIRED ON)
set(CMAKE_CXX_EXTENSIONS OFF)
set(CMAKE_POSITION_INDEPENDENT_CODE ON)
set(CMAKE_EXPORT_COMPILE_COMMANDS ON)
set(CMAKE_RUNTIME_OUTPUT_DIRECTORY ${CMAKE_BINARY_DIR}/bin)
set(CMAKE_LIBRARY_OUTPUT_DIRECTORY ${CMAKE_BINARY_DIR}/lib)
if(NOT CMAKE_BUILD_TYPE)
  set(CMAKE_BUILD_TYPE Release)
endif()

find_program(CCACHE ccache)
if(CCACHE)
  # ccache takes files with precompiled headers only where it may trust their definitions and is told of their use.
  set(CMAKE_CXX_COMPILER_LAUNCHER ${CMAKE_COMMAND} -E env CCACHE_SLOPPINESS=pch_defines,time_macros ${CCACHE})
  add_compile_options($<$<COMPILE_LANGUAGE:CXX>:-fpch-preprocess>)
  set(CMAKE_CUDA_COMPILER_LAUNCHER ${CCACHE})
endif()
find_program(MOLD mold)
if(MOLD)
  add_link_options(-fuse-ld=mold)
endif()

# -O3 vectorises; none of these flags changes the value of a sum or sets flush-to-zero, as -ffast-math would.
add_compile_options($<$<COMPILE_LANGUAGE:CXX>:-Wall> $<$<COMPILE_LANGUAGE:CXX>:-Wextra> $<$<COMPILE_LANGUAGE:CXX>:-Wno-unused-parameter>
                    $<$<COMPILE_LANGUAGE:CXX>:-Wno-unknown-pragmas> $<$<COMPILE_LANGUAGE:CXX>:-fopenmp>
                    $<$<AND:$<COMPILE_LANGUAGE:CXX>,$<CONFIG:Release>>:-O3> $<$<COMPILE_LANGUAGE:CXX>:-march=${MOE_CPU_ARCH}>
                    $<$<COMPILE_LANGUAGE:CXX>:-fno-math-errno> $<$<COMPILE_LANGUAGE:CXX>:-fno-trapping-math>)
add_compile_definitions($<$<CONFIG:Release>:NDEBUG>)
if(MOE_SANITIZE)
  add_compile_options($<$<COMPILE_LANGUAGE:CXX>:-fsanitize=${MOE_SANITIZE}> $<$<COMPILE_LANGUAGE:CXX>:-fno-omit-frame-pointer> $<$<COMPILE_LANGUAGE:CXX>:-g1>)
  add_link_options(-fsanitize=${MOE_SANITIZE})
endif()
include_directories(${CMAKE_SOURCE_DIR})

# __FILE__ (the `where` of an error) reads core/base/log.cpp, and no path of the build machine ends up in a binary.
add_compile_options($<$<COMPILE_LANGUAGE:CXX>:-fmacro-prefix-map=${CMAKE_SOURCE_DIR}/=>
                    $<$<COMPILE_LANGUAGE:CUDA>:-Xcompiler=-fmacro-prefix-map=${CMAKE_SOURCE_DIR}/=>)

# Debian ships no static libfmt, and the portable archive carries no libraries: core/base/fmt.cpp is the compiled part of the system's fmt,
# core/tensor/fmt.cpp that of LibTorch's own. They name the templates of fmt 9 and 12; others are header-only, which takes a file a third
# longer to compile.
find_path(MOE_FMT_INCLUDE fmt/core.h REQUIRED)
file(STRINGS ${MOE_FMT_INCLUDE}/fmt/core.h fmt_is_9 REGEX "define FMT_VERSION 9[0-9][0-9][0-9][0-9]$")
if(EXISTS ${MOE_TORCH_DIR}/include/fmt/base.h)
  file(STRINGS ${MOE_TORCH_DIR}/include/fmt/base.h fmt_is_12 REGEX "define FMT_VERSION 12[0-9][0-9][0-9][0-9]$")
endif()
if(NOT fmt_is_9 OR NOT fmt_is_12)
  add_compile_definitions(FMT_HEADER_ONLY)
endif()
find_package(Threads REQUIRED)
find_package(nlohmann_json REQUIRED)

# LibTorch's headers cost more than most files that include them. Two ways to pay once: the files of a core folder are compiled
# ten at a time (MOE_UNITY: a clean build in a third of the time; the dev preset leaves it off, for rebuilds of one file), and
# tests and bindings share precompiled headers. Files still include what they use, and names in a folder stay distinct.
option(MOE_UNITY "Compile the files of a core folder together" ON)

# moe_precompile(TARGET KIND HEADERS …): the first target of a kind precompiles the headers, later ones use them.
function(moe_precompile target kind)
  get_property(owner GLOBAL PROPERTY MOE_PRECOMPILED_${kind})
  if(owner)
    target_precompile_headers(${target} REUSE_FROM ${owner})
  else()
    target_precompile_headers(${target} PRIVATE ${ARGN})
    set_property(GLOBAL PROPERTY MOE_PRECOMPILED_${kind} ${target})
  endif()
endfunction()

# moe_library(NAME DEPS …): a static library of all .cpp (and, with CUDA, .cu) files of the current folder and of its
# direct subfolders. DEPS are the folders that it may include.
function(moe_library name)
  cmake_parse_arguments(ARG "" "" "DEPS;EXCLUDE" ${ARGN})
  file(GLOB sources CONFIGURE_DEPENDS ${CMAKE_CURRENT_SOURCE_DIR}/*.cpp ${CMAKE_CURRENT_SOURCE_DIR}/*/*.cpp)
  if(MOE_WITH_CUDA)
    file(GLOB cuda_sources CONFIGURE_DEPENDS ${CMAKE_CURRENT_SOURCE_DIR}/*.cu ${CMAKE_CURRENT_SOURCE_DIR}/*/*.cu)
    list(APPEND sources ${cuda_sources})
    set_source_files_properties(${cuda_sources} PROPERTIES SKIP_UNITY_BUILD_INCLUSION ON)   # CMake before 3.31 does so by itself
  endif()
  foreach(file ${ARG_EXCLUDE})
    list(REMOVE_ITEM sources ${CMAKE_CURRENT_SOURCE_DIR}/${file})
  endforeach()
  add_library(moe_${name} STATIC ${sources})
  target_link_libraries(moe_${name} PUBLIC ${ARG_DEPS})
  set_target_properties(moe_${name} PROPERTIES UNITY_BUILD ${MOE_UNITY} UNITY_BUILD_BATCH_SIZE 10)
endfunction()

# moe_test(FOLDER DEPS …): one test executable of tests/unit/FOLDER/*.cpp.
function(moe_test folder)
  cmake_parse_arguments(ARG "" "" "DEPS" ${ARGN})
  file(GLOB sources CONFIGURE_DEPENDS ${CMAKE_CURRENT_SOURCE_DIR}/unit/${folder}/*.cpp)
  if(sources)
    add_executable(test_${folder} ${sources})
    target_link_libraries(test_${folder} PRIVATE ${ARG_DEPS} moe_test_main)
    if(folder MATCHES "^(base|config|plan|metrics|draw)$")
      moe_precompile(test_${folder} tests <fmt/format.h> <nlohmann/json.hpp> "${CMAKE_SOURCE_DIR}/tests/catch.h")
    else()
      moe_precompile(test_${folder} torch_tests <ATen/ATen.h> "${CMAKE_SOURCE_DIR}/tests/catch.h")
    endif()
  endif()
endfunction()
