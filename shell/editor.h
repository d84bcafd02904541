// Reads inputs from a person: readline with our own drawing, else libedit, else plain lines.
#pragma once
#include "lua/session/session.h"
#include "shell/history.h"

#include <memory>
#include <optional>
#include <string>

namespace moe::shell {

class Editor {
public:
    virtual ~Editor() = default;
    /// One input, which may have several lines; "" for a line that was given up with Ctrl-C, nothing at the end of input.
    virtual std::optional<std::string> read() = 0;
};

/// The best one for this terminal. Both arguments outlive it. $MOELAB_EDITOR = readline, libedit or plain asks for one.
std::unique_ptr<Editor> make_editor(lua::Session& session, const History& history, bool colour);

/// What a signal handler tells the editor while it waits for a key: the input is given up.
void give_up_input() noexcept;

}  // namespace moe::shell
