#include "lua/bind/lua.h"
#include "lua/session/lexer.h"
#include "lua/session/session.h"
#include "tests/catch.h"
#include "tests/folder.h"

#include <algorithm>

using namespace moe;
using moe::lua::Completion;
using moe::lua::Session;

namespace {
lua::SessionOptions interactive_options() {
    lua::SessionOptions o;
    o.print = [](std::string_view) {};
    o.interactive = true;
    return o;
}
struct Live {
    Session session{interactive_options()};
    /// Matches at the "|" in the code, each as the whole code would read, joined by spaces.
    std::string at(std::string code) {
        size_t cursor = code.find('|');
        code.erase(cursor, 1);
        Completion c = session.complete(code, cursor);
        std::string all;
        for (auto& m : c.matches) all += (all.empty() ? "" : " ") + m;
        return all;
    }
    bool offers(const std::string& code, const std::string& name) { return (" " + at(code) + " ").find(" " + name + " ") != std::string::npos; }
    void run(const std::string& code) {
        lua::Result r = session.eval(code);
        INFO((r.error ? Error(*r.error).what() : ""));
        REQUIRE(r.ok());
    }
};
}  // namespace

TEST_CASE("complete: globals, names of the input and keywords", "[session]") {
    Live s;
    CHECK(s.at("mo|") == "moe");
    CHECK(s.at("local counter = 1; print(cou|") == "counter");
    CHECK(s.offers("ret|", "return"));
    CHECK(s.offers("str|", "string"));
    CHECK(s.at("-- mo|").empty());
    CHECK(s.at("zzz|").empty());
    CHECK(s.at("x = 12|").empty());
    Completion c = s.session.complete("print(mo) + 1", 8);
    CHECK(c.begin == 6);
    CHECK(c.end == 8);
}

TEST_CASE("complete: fields after a dot, methods after a colon", "[session]") {
    Live s;
    s.run("t = { alpha = 1, beta = function() end, ['not a name'] = 1, inner = { gamma = 2 } }; u = moe.zeros({2}); w = 'text'");
    CHECK(s.at("t.|") == "alpha beta inner");
    CHECK(s.at("t:|") == "beta");
    CHECK(s.at("t.inner.ga|") == "gamma");
    CHECK(s.at("t['inner'].ga|") == "gamma");
    CHECK(s.offers("moe.ze|", "zeros"));
    CHECK(s.at("moe.plo|") == "plot");
    CHECK(s.at("moe.fs.wr|") == "write");
    CHECK(s.offers("viz.|", "heatmap"));
    CHECK(s.at("moe.fs.writ.|").empty());
    CHECK(s.offers("u:|", "matmul"));
    CHECK(s.offers("u.|", "shape"));
    CHECK(!s.offers("u.|", "matmul"));
    CHECK(s.offers("w:up|", "upper"));
    CHECK(s.offers("('x'):re|", "rep"));
    CHECK(s.at("nothing.here.|").empty());
    s.run("child = setmetatable({ own = 1 }, { __index = { taught = 1 } })");
    CHECK(s.at("child.|") == "own taught");
}

TEST_CASE("complete: no Lua function runs", "[session]") {
    Live s;
    s.run("ran = 0; p = setmetatable({}, { __index = function() ran = ran + 1 return { x = 1 } end, __pairs = function() ran = ran + 1 return next, {} end })");
    CHECK(s.at("p.deep.|").empty());
    CHECK(s.at("p.|").empty());
    CHECK(s.session.eval("ran").values == std::vector<std::string>{"0"});
}

TEST_CASE("complete: configurations, their sections and the tables that change them", "[session]") {
    Live s;
    s.run("cfg = moe.config 'tiny'");
    CHECK(s.at("cfg.model.moe.num_exp|") == "num_experts num_experts_per_token");
    CHECK(s.offers("cfg.|", "training"));
    CHECK(s.offers("cfg:|", "with"));
    CHECK(s.at("cfg:with { model = { moe = { num_shared_ex|") == "num_shared_experts = ");
    CHECK(s.at("cfg:with { training = { learning_rate = 1 }, mod|") == "model = ");
    for (std::string made : {"moe.config('tiny')", "moe.config 'tiny'", "moe.config(name .. '_2')", "moe.config { inherits = 'tiny' }", "cfg:with { seed = 1 }", "moe.config('tiny'):with({}):with {}"}) {
        INFO(made);
        CHECK(s.at(made + ":with { model = { moe = { num_shared_ex|") == "num_shared_experts = ");
        CHECK(s.at(made + ".model.moe.num_shared_ex|") == "num_shared_experts");
        CHECK(s.offers("x = " + made + ":|", "with"));
    }
    CHECK(!s.offers("moe.zeros('tiny'):with { model = { |", "num_layers = "));
    CHECK(s.at("moe.run { config = { model = { moe = { num_shared_ex|") == "num_shared_experts = ");
    CHECK(s.at("help(cfg, \"model.moe.num_shared_ex|") == "model.moe.num_shared_experts");
    CHECK(s.at("cfg:with { [\"model.moe.num_shared_ex|") == "model.moe.num_shared_experts");
}

TEST_CASE("complete: keys of option tables and values that a help text quotes", "[session]") {
    Live s;
    CHECK(s.at("moe.run { con|") == "config =  console = ");
    CHECK(s.offers("moe.run { config = 'tiny', |", "name"));
    CHECK(s.at("moe.resume('last', { model = { moe_|") == "moe_layer_freq = ");
    CHECK(s.at("moe.resume('last', {}, { output_|") == "output_dir = ");
    CHECK(s.at("moe.config 'ti|").find("tiny") != std::string::npos);
    CHECK(s.at("require 'moe.plo|") == "moe.plot");
    CHECK(s.at("viz.line { tit|") == "title = ");
    CHECK(s.at("viz.line({ { y = { 1, 2 } } }, { log_|") == "log_x =  log_y = ");
    CHECK(s.at("viz.bars { { y = { 1 } }, categ|") == "categories = ");
    CHECK(s.at("viz.histogram({ 1, 2 }, { bi|") == "bins = ");
}

TEST_CASE("complete: where an argument begins the call is explained, and its options are offered", "[session]") {
    Live s;
    s.run("t = moe.zeros({2}); cfg = moe.config 'tiny'");
    auto note = [&](const std::string& code) { return s.session.complete(code, code.size()).note; };
    CHECK(s.at("moe.progress(|").empty());
    CHECK(note("moe.progress(").starts_with("moe.progress(total, {label =})"));
    CHECK(s.at("moe.progress(3, |") == "{ label = ");
    CHECK(s.at("moe.fs.list('.', |") == "{ recursive =  { suffix = ");
    CHECK(s.at("cfg:params(|").empty());
    CHECK(note("cfg:params(").starts_with("cfg:params()"));
    CHECK(note("cfg:params(").find(". ") == std::string::npos);
    CHECK(s.offers("nobody(|", "moe"));
    CHECK(s.offers("moe.progress(mo|", "moe"));
    CHECK(note("moe.progress(mo").empty());
    CHECK(s.at("help(t, \"cums|") == "cumsum");
    CHECK(s.at("help(t, 'shap|") == "shape");
    CHECK(s.at("help(moe, 'config_na|") == "config_names");
    CHECK(s.at("help \"tensor:cums|") == "tensor:cumsum");
    CHECK(s.at("help 'model.moe.num_shared_ex|") == "model.moe.num_shared_experts");
}

TEST_CASE("complete: paths in texts, elements after brackets", "[session]") {
    Live s;
    test::Folder folder;
    folder.write("first.txt", "");
    folder.write("second.txt", "");
    std::string path = folder / "";
    CHECK(s.at("print('" + path + "fi|") == path + "first.txt");
    CHECK(s.at("print('" + path + "|") == path + "first.txt " + path + "second.txt");
    s.run("list = { 5, 6, 7, name = 1 }");
    CHECK(s.at("list[|") == "\"name\"] 1] 2] 3]");
}

TEST_CASE("inspect: help texts, values, keys of configurations, source", "[session]") {
    Live s;
    lua::Result r = s.session.eval("function twice(x)\n  return 2 * x\nend\ncfg = moe.config 'tiny'; t = moe.zeros({2})", "input 1");
    REQUIRE(r.ok());
    CHECK(s.session.inspect("moe.zeros({2})", 7, false).text.starts_with("moe.zeros("));
    CHECK(s.session.inspect("moe.zeros({2}, ", 15, false).text.starts_with("moe.zeros("));
    CHECK(s.session.inspect("t:sum", 5, false).text.starts_with("t"));
    CHECK(s.session.inspect("cfg.model.moe.num_experts", 25, false).text.find("num_experts") != std::string::npos);
    CHECK(s.session.inspect("t", 1, false).text.find("tensor") != std::string::npos);
    CHECK(!s.session.inspect("nothing", 7, false).found());
    CHECK(!s.session.inspect("", 0, true).found());
    CHECK(s.session.inspect("twice", 5, true).source.find(":1\nfunction twice(x)\n  return 2 * x\nend") != std::string::npos);
    CHECK(s.session.inspect("viz.heatmap", 11, true).source.find("function") != std::string::npos);
}

TEST_CASE("session: the locals of an input stay for the next, those of Lua's names and attributes do not", "[session]") {
    Live s;
    s.run("local a, b = 1\nlocal function f() return 'f' end\nlocal c\ndo local inner = 1 end for i = 1, 1 do local loop = 1 end");
    CHECK(s.session.eval("a, b, c, f(), inner, loop").values == std::vector<std::string>{"1", "nil", "nil", "f", "nil", "nil"});
    s.run("local type = 'mine' local closed <close> = nil local fixed <const> = 3");
    CHECK(s.session.eval("type(type), closed, fixed").values == std::vector<std::string>{"function", "nil", "nil"});
    CHECK(s.session.eval("local x =\n= 1", "input 9").error->where == "input 9:2");
    auto keep_none = [](const void*, std::string_view) { return false; };
    CHECK(lua::with_locals_kept("local t = { f = function() local x = 1 end }", keep_none, nullptr) == "      t = { f = function() local x = 1 end }");
    CHECK(lua::with_locals_kept("if a then local x = 1 elseif b then local y else local z end local w", keep_none, nullptr)
          == "if a then local x = 1 elseif b then local y else local z end       w = nil");
    CHECK(lua::with_locals_kept("repeat local x = 1 until x local s = 'local y'", keep_none, nullptr) == "repeat local x = 1 until x       s = 'local y'");
}

TEST_CASE("session: results are echoed as literals, the first is _", "[session]") {
    Live s;
    auto echo = [&](const std::string& code) {
        lua::Result r = s.session.eval(code);
        return r.error ? "error: " + r.error->op : r.values.empty() ? "" : r.values[0];
    };
    CHECK(echo("{ 1, 2, { a = 'x\\n', [3] = true }, ['b c'] = nil, z = 1 }") == "{1, 2, {[3] = true, a = \"x\\n\"}, z = 1}");
    CHECK(echo("_.z") == "1");
    CHECK(echo("_ + 1") == "2");
    CHECK(echo("nil") == "");
    CHECK(echo("x = 1") == "");
    CHECK(echo("'plain'") == "plain");
    CHECK(echo("{ { { { { 1 }, 2 } } } }") == "{{{{… 2 items}}}}");
    CHECK(echo("{ { { {} } } }") == "{{{{}}}}");
    CHECK(echo("(function() local t = {} t.self = t return t end)()") == "{self = {cycle}}");
    std::string many = echo("(function() local t = {} for i = 1, 500 do t[i] = i end return t end)()");
    CHECK(many.find("… 450 more") != std::string::npos);
    CHECK(std::count(many.begin(), many.end(), '\n') < 10);
    CHECK(echo("setmetatable({}, { __tostring = function() error('bad', 0) end })") == "error: bad");
    CHECK(echo("{ moe.zeros({2, 2}) }").find("float32 [2, 2]") != std::string::npos);
    CHECK(s.session.history().back().code == "{ moe.zeros({2, 2}) }");
    CHECK(echo("{ b = moe.zeros { 3 }, a = moe.zeros { 2, 3 }, n = { 1, 2 } }") == "{\n  a = float32 [2, 3] cpu,\n  b = float32 [3] cpu,\n  n = {1, 2}\n}");
    CHECK(echo("{ f = function() end, g = moe.zeros, h = coroutine.create(print) }") == "{f = function at input:1, g = function moe.zeros, h = thread}");
    CHECK(echo("moe.run") == "function moe.run");
    CHECK(echo("io.open") == "function");
    std::string deep = echo("(function() local t = {} for i = 1, 45 do t[i] = { name = 'x', values = { ('y'):rep(60), ('z'):rep(60) } } end return t end)()");
    CHECK(std::count(deep.begin(), deep.end(), '\n') == 39);
    CHECK(deep.find("more lines") != std::string::npos);
}

TEST_CASE("session: exit ends it in spite of a pcall, and Lua goes on to work", "[session]") {
    Live s;
    CHECK(!s.session.exit_code());
    CHECK(!s.session.eval("while true do pcall(exit, 3) end").ok());
    CHECK(s.session.exit_code() == 3);
    CHECK(s.session.eval("1").ok());
}

TEST_CASE("lexer: what is open and what is not", "[session]") {
    auto last = [](std::string_view code) { return lua::tokens(code).back(); };
    CHECK(last("x = 'abc").open);
    CHECK(last("x = 'a\\'").open);
    CHECK(!last("x = 'a\\''").open);
    CHECK(last("x = [==[ ]] ]=]").open);
    CHECK(!last("x = [==[ ]] ]==]").open);
    CHECK(last("--[[ a").kind == lua::TokenKind::comment);
    CHECK(lua::tokens("a..b").size() == 3);
    CHECK(lua::tokens("1..2").size() == 3);
    CHECK(lua::tokens("0x1p-3 1e+5 3.25").size() == 3);
    CHECK(lua::tokens("\xff\x01").size() == 2);
}

TEST_CASE("session: sorting is as in Lua and can be interrupted from another thread", "[session]") {
    Live s;
    CHECK(s.session.eval("(function() local t = { 3, 1, 2 } table.sort(t) return table.concat(t, ' ') end)()").values[0] == "1 2 3");
    CHECK(s.session.eval("(function() local t = { 3.5, 1, 2 } table.sort(t) return table.concat(t, ' ') end)()").values[0] == "1 2 3.5");
    CHECK(s.session.eval("(function() local t = { 'b', 'c', 'a' } table.sort(t) return table.concat(t) end)()").values[0] == "abc");
    CHECK(s.session.eval("(function() local t = { 1.5, 0.5, -1e300 } table.sort(t) return t[1] end)()").values[0] == "-1e+300");
    CHECK(s.session.eval("(function() local t = { 1, 3, 2 } table.sort(t, function(a, b) return a > b end) return table.concat(t) end)()").values[0] == "321");
    CHECK(s.session.eval("table.sort({ 1, 'a' })").error);
    CHECK(s.session.eval("table.sort(3)").error->kind == ErrorKind::usage);
}

TEST_CASE("complete and inspect: any cursor in any code, broken ones too, and the stack is as it was", "[session]") {
    Live s;
    s.run("cfg = moe.config 'tiny'; t = moe.zeros({2}); t2 = moe.zeros({2}); t2:free(); loop = setmetatable({}, {}); getmetatable(loop).__index = loop; n = { { 1 }, a = {} }");
    for (std::string code : {"moe.run { config = { model = { moe = { ", "x = ((t[1]).[\"a\"]):f(}{)]", "cfg.model['moe'].num[0].x", "help(cfg, \"model.", "t2.shape[0]:sum{", "loop.a.b.c", "n[1][2][3", "[[ long", "'\\", "a..b...c",
                             "moe.resume('x', { training = { , { = [", "-- c\n--[[ d", "\xff\xfe.\x01:", "local function f(a, ...) return f(", "moe.nothing.here(", "cfg:with(", "}}}}", "((((", "t:", ":", ".", "1.5.x", "goto ::a:: moe"}) {
        for (size_t cursor = 0; cursor <= code.size() + 1; ++cursor) {
            lua::Completion c = s.session.complete(code, cursor);
            CHECK(c.begin <= c.end);
            CHECK(c.end <= code.size() + 1);
            s.session.inspect(code, cursor, true);
        }
        s.session.is_complete(code);
        lua::with_locals_kept("local " + code, [](const void*, std::string_view) { return false; }, nullptr);
        CHECK(lua_gettop(s.session.state()) == 0);
    }
    CHECK(s.session.eval("1").ok());
}
