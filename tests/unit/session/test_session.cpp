#include "lua/bind/lua.h"
#include "lua/session/session.h"
#include "tests/catch.h"
#include "tests/folder.h"

#include <chrono>
#include <thread>

using namespace moe;
using moe::lua::Arguments;
using moe::lua::Result;
using moe::lua::Session;

namespace {
/// A session that collects what it prints.
struct Quiet {
    std::string out;
    Session session{{.print = [this](std::string_view text) { out += text; }, .quiet = false, .command = "", .device = "", .json = false}};
    std::string value(const std::string& code) {
        Result r = session.eval(code);
        if (r.error) return "error: " + std::string(Error(*r.error).what());
        std::string line;
        for (auto& v : r.values) line += (line.empty() ? "" : " ") + v;
        return line;
    }
};

}  // namespace

TEST_CASE("session: expressions give values, statements run, globals stay", "[session]") {
    Quiet q;
    CHECK(q.value("1 + 1") == "2");
    CHECK(q.value("x = 3") == "");
    CHECK(q.value("x, 'a', nil") == "3 a nil");
    CHECK(q.value("for i = 1, 3 do print(i, x) end") == "");
    CHECK(q.out == "1\t3\n2\t3\n3\t3\n");
}

TEST_CASE("session: moe, viz and help are there; modules load on first use", "[session]") {
    Quiet q;
    CHECK(q.value("type(moe), type(viz), type(help)") == "table table function");
    CHECK(q.value("require 'moe' == moe, require 'moe.plot' == viz, moe.plot == viz") == "true true true");
    Result r = q.session.eval("moe.zeross({1})");
    REQUIRE(r.error);
    CHECK(r.error->kind == ErrorKind::usage);
    CHECK(r.error->hint == "did you mean \"zeros\"?");
}

TEST_CASE("session: errors are objects with kind, place and traceback", "[session]") {
    Quiet q;
    Result r = q.session.eval("local t = nil\nreturn t.x", "cell 1");
    REQUIRE(r.error);
    CHECK(r.error->kind == ErrorKind::lua);
    CHECK(r.error->where == "cell 1:2");
    CHECK(r.error->op.find("index a nil value") != std::string::npos);
    CHECK(r.error->traceback.find("stack traceback") != std::string::npos);
    CHECK(r.exit_code() == 1);
    r = q.session.eval("return moe.check_keys({ colour = 1 }, { 'color' }, 'paint')");
    REQUIRE(r.error);
    CHECK(r.error->kind == ErrorKind::usage);
    CHECK(r.error->op == "paint");
    CHECK(r.error->hint == "did you mean \"color\"?");
    CHECK(r.exit_code() == 2);
    CHECK(q.value("select(2, pcall(moe.zeros, 'x')).kind") == "usage");
    CHECK(q.value("tostring(select(2, pcall(moe.zeros, 'x')))").find("got \"x\"") != std::string::npos);
}

TEST_CASE("session: any value can be raised, and the session goes on", "[session]") {
    Quiet q;
    CHECK(q.session.eval("error({ code = 3 })").error->kind == ErrorKind::lua);
    CHECK(q.session.eval("error(nil)").error);
    CHECK(q.session.eval("error('plain', 0)").error->op == "plain");
    CHECK(q.session.eval("error(setmetatable({}, { __tostring = function() return 'mine' end }))").error->op == "mine");
    CHECK(q.session.eval("local function f() return f() + 1 end f()").error);
    CHECK(q.value("1") == "1");
    CHECK(lua_gettop(q.session.state()) == 0);
}

TEST_CASE("session: syntax errors name the line", "[session]") {
    Quiet q;
    Result r = q.session.eval("x = 1\ny = = 2");
    REQUIRE(r.error);
    CHECK(r.error->kind == ErrorKind::lua);
    CHECK(r.error->where == "input:2");
    test::Folder folder;
    folder.write("script.lua", "#!/usr/bin/env moelab\nlocal a = 1\nlocal b = )\n");
    std::string path = folder / "script.lua";
    r = q.session.run_file(path);
    REQUIRE(r.error);
    CHECK(r.error->where == path + ":3");
}

TEST_CASE("session: files get arg with positional arguments and converted options", "[session]") {
    Quiet q;
    test::Folder folder;
    folder.write("script.lua", "print(arg[0] ~= nil, #arg, arg[1], arg[2])\nfor k, v in pairs(arg.options) do print(k, v, math.type(v) or type(v)) end\nreturn 7");
    std::string path = folder / "script.lua";
    Result r = q.session.run_file(path, Arguments::parse({"first", "a.b=2", "c=1.5", "d=true", "e=x=y", "=z", "f=", "--help"}));
    REQUIRE(r.ok());
    CHECK(r.values == std::vector<std::string>{"7"});
    CHECK(q.out == "true\t2\tfirst\t=z\na.b\t2\tinteger\nc\t1.5\tfloat\nd\ttrue\tboolean\ne\tx=y\tstring\nf\t\tstring\nhelp\ttrue\tboolean\n");
    CHECK(q.session.run_file("/nowhere/x.lua").error->kind == ErrorKind::io);
}

TEST_CASE("session: pairs is in a defined order, numbers first", "[session]") {
    Quiet q;
    CHECK(q.value("(function() local s = '' for k in pairs({ z = 1, a = 1, [10] = 1, [2] = 1, m = 1, 5 }) do s = s .. k .. ' ' end return s end)()") == "1 2 10 a m z ");
    // Fields may be changed and removed while a loop runs, as with next.
    CHECK(q.value("(function() local t, n = { a = 1, b = 2, c = 3 }, 0 for k in pairs(t) do t.c = nil n = n + 1 end return n end)()") == "2");
    CHECK(q.value("math.random(1000), math.random(1000)") == Quiet().value("math.random(1000), math.random(1000)"));
}

TEST_CASE("session: incomplete code is told from wrong code", "[session]") {
    Quiet q;
    CHECK(q.session.is_complete("x = 1"));
    CHECK(q.session.is_complete("1 +  1"));
    CHECK(!q.session.is_complete("for i = 1, 2 do"));
    CHECK(!q.session.is_complete("f(1,"));
    CHECK(!q.session.is_complete("s = [[open"));
    CHECK(q.session.is_complete("x = = 1"));
    CHECK(q.session.is_complete("s = \"open"));
}

TEST_CASE("session: an interrupt ends loops, pcall loops and coroutines, and the session goes on", "[session]") {
    Quiet q;
    for (const char* code : {"while true do end", "while true do pcall(error) end", "while true do pcall(function() while true do end end) end",
                             "coroutine.wrap(function() while true do end end)()", "local co = coroutine.create(function() while true do end end) while true do coroutine.resume(co) end",
                             "moe.sleep(100)"}) {
        auto start = std::chrono::steady_clock::now();
        std::thread later([&] {
            std::this_thread::sleep_for(std::chrono::milliseconds(30));
            q.session.interrupt();
        });
        Result r = q.session.eval(code);
        later.join();
        INFO(code);
        REQUIRE(r.error);
        CHECK(r.error->kind == ErrorKind::interrupted);
        CHECK(r.exit_code() == 130);
        CHECK(std::chrono::steady_clock::now() - start < std::chrono::seconds(10));
        CHECK(q.value("1 + 1") == "2");
    }
}

TEST_CASE("session: coroutines work as in Lua", "[session]") {
    Quiet q;
    CHECK(q.value("(function() local co = coroutine.create(function(a, b) local c = coroutine.yield(a + b) return c * 2 end) "
                  "local r = { coroutine.resume(co, 1, 2) } local s = { coroutine.resume(co, 5) } return r[1], r[2], s[1], s[2], coroutine.status(co) end)()") == "true 3 true 10 dead");
    CHECK(q.value("coroutine.resume(coroutine.create(function() error('x', 0) end))") == "false x");
    CHECK(q.value("(function() local s = 0 for v in coroutine.wrap(function() for i = 1, 4 do coroutine.yield(i) end end) do s = s + v end return s end)()") == "10");
    CHECK(q.value("select(2, pcall(coroutine.wrap(function() moe.zeros('x') end))).kind") == "usage");
    CHECK(q.value("coroutine.resume(3)").find("a coroutine") != std::string::npos);
}

TEST_CASE("session: quiet sessions print nothing", "[session]") {
    Session session({.print = [](std::string_view) { FAIL("printed"); }, .quiet = true, .command = "", .device = "", .json = false});
    CHECK(session.eval("print(1)").ok());
}

TEST_CASE("session: errors of a misspelt global and of an expression point at them", "[session]") {
    Session s({.print = [](std::string_view) {}, .interactive = true});
    CHECK(s.eval("pritn(1)").error->hint == "did you mean \"print\"?");
    CHECK(s.eval("nothing_like_it(1)").error->hint.empty());
    CHECK(s.eval("1 +* 2").error->op == "unexpected symbol near '*'");
    CHECK(s.eval("  x ~").error->op == "syntax error near '~'");
    CHECK(s.eval("for = 1").error->op == "<name> expected near '='");
    CHECK(s.inspect("run:set", 7, false).text.starts_with("run:set"));
    CHECK(!s.inspect("run:nothing", 11, false).found());
}

TEST_CASE("session: errors as text and JSON", "[session]") {
    ErrorParts e{ErrorKind::shape, "matmul", "[4, 8]", "[8, 4]", "transpose", "x.lua:3", -1, "stack traceback:\n\t[C]: in function 'f'\n\tlua/moe/plot.lua:3: in function 'g'\n\tx.lua:3: in main chunk\n\t[C]: in ?"};
    CHECK(lua::describe(e, false) == "error: matmul: got [4, 8], want [8, 4] (transpose)\n  at x.lua:3");
    CHECK(lua::describe(e, true).find("\033[31m") == 0);
    CHECK(lua::to_json(e).find("\"kind\":\"shape\"") != std::string::npos);
    ErrorParts deep = e;
    deep.traceback = "stack traceback:\n\tx.lua:3: in function 'h'\n\tx.lua:9: in main chunk\n\t[C]: in ?";
    CHECK(lua::describe(deep, false).ends_with("\n" + deep.traceback));
    // Places of this program are for who works on it.
    e.where = "core/config/load.cpp:77";
    CHECK(lua::describe(e, false) == "error: matmul: got [4, 8], want [8, 4] (transpose)");
    e.kind = ErrorKind::internal;
    CHECK(lua::describe(e, false).ends_with("\n  at core/config/load.cpp:77"));
    e.kind = ErrorKind::config;
    for (const char* ours : {"core/kernels/linear/linear_sm90.cu:3", "lua/bind/run.cpp:9", "shell/launch.h:1", "lua/moe/plot.lua:12", "lua/moe/commands/train.lua:4"}) {
        e.where = ours;
        CHECK(lua::describe(e, false).find(ours) == std::string::npos);
    }
    // A user's folders may have the names of ours.
    for (const char* theirs : {"core/model.lua:3", "shell/config.json:7", "lua/moe/mine.lua:2", "lua/bind/x.lua:1", "scripts/core/x.cpp:1"}) {
        e.where = theirs;
        CHECK(lua::describe(e, false).ends_with(std::string("\n  at ") + theirs));
    }
}

TEST_CASE("session: exit and quit end it where they are no global of the user's", "[session]") {
    Session session({.print = [](std::string_view) {}, .quiet = false, .command = "", .device = "", .json = false, .interactive = true});
    for (const char* word : {"exit", "quit", "quit()"}) CHECK(session.ends(word));
    for (const char* other : {"", "exit()", "exit(3)", "quitter"}) CHECK(!session.ends(other));
    REQUIRE(session.eval("function quit() return 1 end").ok());
    CHECK(session.ends("exit"));
    CHECK(!session.ends("quit"));
    CHECK(!session.ends("quit()"));
    REQUIRE(session.eval("quit = nil; exit = 4").ok());
    CHECK(!session.ends("exit"));
    CHECK(session.ends("quit"));
    REQUIRE(session.eval("exit = nil").ok());
    CHECK(session.ends("exit"));
}
