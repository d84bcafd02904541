#include "shell/readline.h"

#include <dlfcn.h>

#include <initializer_list>

namespace moe::shell {
namespace {
void* open_first(std::initializer_list<const char*> names) {
    for (const char* name : names)
        if (void* handle = dlopen(name, RTLD_NOW | RTLD_LOCAL)) return handle;
    return nullptr;
}

/// Fills members by symbol; remembers whether all were there.
struct Symbols {
    void* handle;
    bool complete = true;
    template <class T>
    void operator()(T& member, const char* name) {
        member = reinterpret_cast<T>(dlsym(handle, name));
        complete = complete && member;
    }
};
}  // namespace

const Readline* open_readline() {
    static Readline r;
    static const bool found = [] {
        Symbols get{open_first({"libreadline.so.8", "libreadline.so.7"})};
        if (!get.handle) return false;
        get(r.readline, "readline");
        get(r.initialize, "rl_initialize");
        get(r.variable_bind, "rl_variable_bind");
        get(r.bind_key_in_map, "rl_bind_key_in_map");
        get(r.bind_keyseq_in_map, "rl_bind_keyseq_in_map");
        get(r.get_keymap_by_name, "rl_get_keymap_by_name");
        get(r.insert_text, "rl_insert_text");
        get(r.delete_text, "rl_delete_text");
        get(r.kill_text, "rl_kill_text");
        get(r.begin_undo_group, "rl_begin_undo_group");
        get(r.end_undo_group, "rl_end_undo_group");
        get(r.delete_next, "rl_delete");
        get(r.get_previous_history, "rl_get_previous_history");
        get(r.get_next_history, "rl_get_next_history");
        get(r.prep_terminal, "rl_prep_terminal");
        get(r.add_history, "add_history");
        get(r.clear_history, "clear_history");
        get(r.using_history, "using_history");
        get(r.line_buffer, "rl_line_buffer");
        get(r.display_prompt, "rl_display_prompt");
        get(r.readline_name, "rl_readline_name");
        get(r.point, "rl_point");
        get(r.end, "rl_end");
        get(r.done, "rl_done");
        get(r.catch_signals, "rl_catch_signals");
        get(r.catch_sigwinch, "rl_catch_sigwinch");
        get(r.getc_function, "rl_getc_function");
        get(r.redisplay_function, "rl_redisplay_function");
        get(r.startup_hook, "rl_startup_hook");
        return get.complete;
    }();
    return found ? &r : nullptr;
}

const LineReader* open_libedit() {
    static LineReader e;
    static const bool found = [] {
        Symbols get{open_first({"libedit.so.2", "libedit.so.0"})};
        if (!get.handle) return false;
        get(e.readline, "readline");
        get(e.add_history, "add_history");
        return get.complete;
    }();
    return found ? &e : nullptr;
}
}  // namespace moe::shell
