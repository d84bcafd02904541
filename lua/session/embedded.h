// The Lua modules of lua/moe, compiled into the binary by cmake/MoeEmbed.cmake.
#pragma once
#include <span>
#include <string_view>

namespace moe::lua {

/// name as require knows it ("moe.plot", "moe.commands.bench"); file for messages ("lua/moe/plot.lua").
struct EmbeddedModule {
    std::string_view name, file, text;
};
std::span<const EmbeddedModule> embedded_modules();

}  // namespace moe::lua
