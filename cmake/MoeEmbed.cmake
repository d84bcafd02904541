# moe_embed(TARGET FUNCTION ROOT FILES…): the files become part of the target, as `const std::vector<moe::EmbeddedFile>& FUNCTION()`
# (core/base/embedded.h), which the target's code declares. FILES are paths below ROOT.
# As a script (cmake -DOUT=… -DFUNCTION=… -DROOT=… "-DFILES=a|b" -P MoeEmbed.cmake) it writes that function.
# A literal is cut every 8000 characters, below what compilers must accept.
if(NOT CMAKE_SCRIPT_MODE_FILE)
  set(MOE_EMBED_SCRIPT ${CMAKE_CURRENT_LIST_FILE})
  function(moe_embed target function root)
    set(out ${CMAKE_CURRENT_BINARY_DIR}/embedded.cpp)
    list(JOIN ARGN "|" files)
    list(TRANSFORM ARGN PREPEND ${root}/)
    add_custom_command(OUTPUT ${out} DEPENDS ${ARGN} ${MOE_EMBED_SCRIPT} VERBATIM
                       COMMAND ${CMAKE_COMMAND} -DOUT=${out} -DFUNCTION=${function} -DROOT=${root} "-DFILES=${files}" -P ${MOE_EMBED_SCRIPT})
    target_sources(${target} PRIVATE ${out})
  endfunction()
  return()
endif()

string(REPLACE "|" ";" FILES "${FILES}")
string(REGEX MATCH "^(.*)::([^:]*)$" whole "${FUNCTION}")
set(space ${CMAKE_MATCH_1})
set(name ${CMAKE_MATCH_2})
set(code "#include \"core/base/embedded.h\"\n\nnamespace ${space} {\nconst std::vector<moe::EmbeddedFile>& ${name}() {\n    static const std::vector<moe::EmbeddedFile> files = {\n")
foreach(file IN LISTS FILES)
  # Brackets and semicolons are list syntax to CMake: the text is only ever used quoted.
  file(READ "${ROOT}/${file}" text)
  string(LENGTH "${text}" length)
  string(APPEND code "        {\"${file}\",")
  set(start 0)
  while(start LESS length)
    string(SUBSTRING "${text}" ${start} 8000 part)
    string(APPEND code " R\"~~~(${part})~~~\"")
    math(EXPR start "${start} + 8000")
  endwhile()
  string(APPEND code "},\n")
endforeach()
string(APPEND code "    };\n    return files;\n}\n}  // namespace ${space}\n")
file(WRITE "${OUT}" "${code}")
