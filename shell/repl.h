// The interactive prompt, and its plain mode where standard input is no terminal.
#pragma once
#include "lua/session/session.h"

namespace moe::shell {

/// Reads inputs until Ctrl-D or exit(); gives the program's exit code.
int run_prompt(lua::Session& session);

/// SessionOptions::page of a session with a prompt.
void page_help(std::string_view text);

/// Evaluates what rank 0's prompt, or plain mode, evaluates. The exit code is rank 0's.
int run_follower(lua::Session& session);

/// Reads statements from standard input, prints results and errors, no prompt. The exit code is that of the first error.
int run_piped(lua::Session& session, bool json);

}  // namespace moe::shell
