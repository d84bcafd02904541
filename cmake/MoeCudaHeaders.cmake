# Headers of packages (requirements_headers.txt) that the CUDA parts are compiled with: DeepGEMM's, from which core/kernels/grouped is made, and cuDNN's graph interface for
# core/kernels/mla. Where MOE_HEADERS_DIR is not given they are looked for beside LibTorch, where pip puts them. cudnn.h comes with LibTorch's cuDNN or with the toolkit.
if(MOE_WITH_CUDA)
  get_filename_component(beside_torch ${MOE_TORCH_DIR} DIRECTORY)
  if(NOT MOE_HEADERS_DIR)
    set(MOE_HEADERS_DIR ${beside_torch})
  endif()
  set(MOE_DEEPGEMM_DIR ${MOE_HEADERS_DIR}/deep_gemm/include)
  set(deepgemm_version none)
  if(EXISTS ${MOE_DEEPGEMM_DIR}/../VERSION AND EXISTS ${MOE_DEEPGEMM_DIR}/deep_gemm/impls/sm90_bf16_gemm.cuh)
    file(STRINGS ${MOE_DEEPGEMM_DIR}/../VERSION deepgemm_version)
  endif()
  set(frontend_version none)
  if(EXISTS ${MOE_HEADERS_DIR}/include/cudnn_frontend_version.h)
    file(STRINGS ${MOE_HEADERS_DIR}/include/cudnn_frontend_version.h frontend_lines REGEX "define CUDNN_FRONTEND_(MAJOR|MINOR|PATCH)_VERSION")
    string(REGEX REPLACE "[^0-9]+([0-9]+)[^0-9]+([0-9]+)[^0-9]+([0-9]+).*" "\\1.\\2.\\3" frontend_version "${frontend_lines}")
  endif()
  if(NOT deepgemm_version STREQUAL "0.2.5" OR NOT frontend_version STREQUAL "1.32.0")
    message(FATAL_ERROR "Headers are missing or of another version: got DeepGEMM \"${deepgemm_version}\" and cuDNN's front end \"${frontend_version}\" in MOE_HEADERS_DIR=\"${MOE_HEADERS_DIR}\", want 0.2.5 and 1.32.0.\n"
                        "./moelab fetches them and sets it. By hand: pip install --no-deps --require-hashes --target FOLDER -r cmake/requirements_headers.txt, then "
                        "-DMOE_HEADERS_DIR=FOLDER. Without CUDA parts (-DMOE_CUDA=off, or the cpu preset) they are not needed.")
  endif()
  find_path(MOE_CUDNN_DIR cudnn.h HINTS ${beside_torch}/nvidia/cudnn/include ${CUDAToolkit_INCLUDE_DIRS})
  if(NOT MOE_CUDNN_DIR)
    message(FATAL_ERROR "cudnn.h is missing: got none beside MOE_TORCH_DIR=\"${MOE_TORCH_DIR}\", in the CUDA toolkit or in the system, want that of cuDNN 9. Debian's package of it is nvidia-cudnn; "
                        "-DMOE_CUDNN_DIR=FOLDER names its folder.")
  endif()
endif()
