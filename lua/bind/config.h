// A configuration in Lua: frozen; :with { … } makes a changed copy.
#pragma once
#include "core/config/config.h"
#include "lua/bind/lua.h"

#include <memory>

namespace moe::lua {

/// The configuration and what it was made from (printing marks the differences).
struct ConfigValue {
    std::shared_ptr<const Config> config, base;
};
template <>
struct TypeName<ConfigValue> {
    static constexpr const char* value = "config";
};

/// A config object, a ready name, a path or a table of keys (with `inherits` or over the defaults).
ConfigValue check_config(lua_State* L, int index, const char* name);
/// A copy with the changes of the table at index, as cfg:with { … } makes it; nil or none changes nothing.
Config changed_config(lua_State* L, int index, const Config& config);
/// The configuration with the session's device, where the command line named one.
Config with_session_device(lua_State* L, const Config& config);

}  // namespace moe::lua
