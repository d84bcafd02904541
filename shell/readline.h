// GNU readline, opened at run time where the machine has it: the program needs no file of it to be built, packed or started.
#pragma once
#include <cstdio>

namespace moe::shell {

/// The functions and variables that the editor uses, as readline's manual declares them.
struct Readline {
    using Command = int(int count, int key);
    char* (*readline)(const char* prompt);
    int (*initialize)();
    int (*variable_bind)(const char* name, const char* value);
    int (*bind_key_in_map)(int key, Command*, void* keymap);
    int (*bind_keyseq_in_map)(const char* keys, Command*, void* keymap);
    void* (*get_keymap_by_name)(const char* name);
    int (*insert_text)(const char* text);
    int (*delete_text)(int begin, int end);
    int (*kill_text)(int begin, int end);
    int (*begin_undo_group)();
    int (*end_undo_group)();
    Command *delete_next, *get_previous_history, *get_next_history;
    void (*prep_terminal)(int with_8_bits);
    void (*add_history)(const char* line);
    void (*clear_history)();
    void (*using_history)();
    char **line_buffer, **display_prompt;
    const char** readline_name;
    int *point, *end, *done, *catch_signals, *catch_sigwinch;
    int (**getc_function)(std::FILE*);
    void (**redisplay_function)();
    int (**startup_hook)();
};

/// Null where there is no readline of version 7 or newer.
const Readline* open_readline();

/// BSD's libedit, for machines with that alone: a line at a time, without colours.
struct LineReader {
    char* (*readline)(const char* prompt);
    int (*add_history)(const char* line);
};
const LineReader* open_libedit();

}  // namespace moe::shell
