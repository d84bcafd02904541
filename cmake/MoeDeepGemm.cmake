# DeepGEMM's headers, from which core/kernels/grouped is compiled: only with CUDA. Where MOE_DEEPGEMM_DIR is not given they are looked
# for beside LibTorch, where pip puts them.
if(MOE_WITH_CUDA)
  if(NOT MOE_DEEPGEMM_DIR)
    get_filename_component(beside_torch ${MOE_TORCH_DIR} DIRECTORY)
    set(MOE_DEEPGEMM_DIR ${beside_torch}/deep_gemm/include)
  endif()
  set(deepgemm_version none)
  if(EXISTS ${MOE_DEEPGEMM_DIR}/../VERSION AND EXISTS ${MOE_DEEPGEMM_DIR}/deep_gemm/impls/sm90_bf16_gemm.cuh)
    file(STRINGS ${MOE_DEEPGEMM_DIR}/../VERSION deepgemm_version)
  endif()
  if(NOT deepgemm_version STREQUAL "0.2.5")
    message(FATAL_ERROR "DeepGEMM's headers are missing or of another version: got \"${deepgemm_version}\" in MOE_DEEPGEMM_DIR=\"${MOE_DEEPGEMM_DIR}\", want 0.2.5.\n"
                        "./moelab fetches them and sets it. By hand: pip install --no-deps --require-hashes --target FOLDER -r cmake/requirements_headers.txt, then "
                        "-DMOE_DEEPGEMM_DIR=FOLDER/deep_gemm/include. Without CUDA parts (-DMOE_CUDA=off, or the cpu preset) they are not needed.")
  endif()
endif()
