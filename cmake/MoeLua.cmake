# Lua 5.4 compiled as C++ (lua_error unwinds, so destructors run), linked statically.
find_path(LUA_CXX_INCLUDE lua.h PATH_SUFFIXES lua5.4 REQUIRED)
find_library(LUA_CXX_LIBRARY NAMES liblua5.4-c++.a REQUIRED)
add_library(lua_imported INTERFACE)
target_include_directories(lua_imported SYSTEM INTERFACE ${LUA_CXX_INCLUDE})
target_link_libraries(lua_imported INTERFACE ${LUA_CXX_LIBRARY} ${CMAKE_DL_LIBS} m)
