#include "core/base/reflect.h"
#include "tests/catch.h"

using namespace moe;
using reflect::Json;

namespace {
struct Inner {
    double factor = 2.0;
    std::vector<std::string> words;
};
struct Outer {
    int64_t count = 1;
    bool flag = false;
    std::string mode = "none";
    std::optional<int64_t> limit;
    Inner inner;
    std::optional<Inner> maybe;
    std::vector<Inner> list;
};
}  // namespace

namespace moe::reflect {
template <>
const Schema& schema<Inner>() {
    static const Schema s("inner", {field("factor", &Inner::factor).above(0).max(10), field("words", &Inner::words)});
    return s;
}
template <>
const Schema& schema<Outer>() {
    static const Schema s("outer", {
        field("count", &Outer::count).alias("num").min(1), field("flag", &Outer::flag),
        field("mode", &Outer::mode).one_of({"none", "half", "full"}).flag_words("full", "none"), field("limit", &Outer::limit).min(0),
        field("inner", &Outer::inner), field("maybe", &Outer::maybe), field("list", &Outer::list),
    });
    return s;
}
}  // namespace moe::reflect

namespace {
Outer read(const Json& value, std::vector<Problem>& problems, Outer start = {}) {
    const auto& s = reflect::schema<Outer>();
    s.read(&start, s.canonical(value, "", s, problems), "", problems);
    return start;
}
}  // namespace

TEST_CASE("reflect: values of every type are read and written back the same", "[base][reflect]") {
    std::vector<Problem> problems;
    Json value = {{"count", 3}, {"flag", true}, {"mode", "half"}, {"limit", 7}, {"inner", {{"factor", 1.5}, {"words", {"a", "b"}}}},
                  {"maybe", {{"factor", 4.0}, {"words", Json::array()}}}, {"list", {{{"factor", 1.0}, {"words", {"c"}}}}}};
    Outer o = read(value, problems);
    CHECK(problems.empty());
    CHECK(Json(reflect::schema<Outer>().write(&o)) == value);
}

TEST_CASE("reflect: a section keeps the keys that are not given, null empties an optional one", "[base][reflect]") {
    std::vector<Problem> problems;
    Outer o = read({{"maybe", {{"words", {"x"}}}}, {"limit", 5}}, problems);
    REQUIRE(o.maybe);
    CHECK(o.maybe->factor == 2.0);
    o = read({{"maybe", {{"factor", 3}}}, {"limit", nullptr}}, problems, o);
    CHECK(o.maybe->words == std::vector<std::string>{"x"});
    CHECK(o.maybe->factor == 3.0);
    CHECK_FALSE(o.limit);
    o = read({{"maybe", nullptr}}, problems, o);
    CHECK_FALSE(o.maybe);
    CHECK(problems.empty());
}

TEST_CASE("reflect: an integer may be a float that is one", "[base][reflect]") {
    std::vector<Problem> problems;
    CHECK(read({{"count", 5e8}}, problems).count == 500000000);
    CHECK(problems.empty());
    for (Json bad : {Json(1.5), Json(1e300), Json(std::nan("")), Json("3"), Json(true), Json(nullptr), Json(uint64_t(1) << 63)}) {
        problems.clear();
        CHECK(read({{"count", bad}}, problems).count == 1);
        REQUIRE(problems.size() == 1);
        CHECK(problems[0].path == "count");
        CHECK(problems[0].want == "an integer 1 or more");
    }
}

TEST_CASE("reflect: true and false stand for words where the field says so", "[base][reflect]") {
    std::vector<Problem> problems;
    CHECK(read({{"mode", true}}, problems).mode == "full");
    CHECK(read({{"mode", false}}, problems).mode == "none");
    CHECK(problems.empty());
}

TEST_CASE("reflect: aliases become the name; two spellings must agree", "[base][reflect]") {
    std::vector<Problem> problems;
    CHECK(read({{"num", 4}}, problems).count == 4);
    CHECK(read({{"num", 4}, {"count", 4}}, problems).count == 4);
    CHECK(problems.empty());
    read({{"num", 4}, {"count", 5}}, problems);
    REQUIRE(problems.size() == 1);
    CHECK(problems[0].got == "count = 5 and num = 4");
}

TEST_CASE("reflect: unknown keys name the nearest, or the section where they belong", "[base][reflect]") {
    std::vector<Problem> problems;
    read({{"cuont", 1}, {"inner", {{"wrods", 1}}}, {"list", {{{"facto", 1}}}}, {"factor", 1}}, problems);
    REQUIRE(problems.size() == 4);
    CHECK(problems[0].text().find("did you mean count?") != std::string::npos);
    CHECK(problems[1].hint == "it belongs to inner.factor or maybe.factor");
    CHECK(problems[2].path == "inner.wrods");
    CHECK(problems[3].path == "list[0].facto");
}

TEST_CASE("reflect: a wrong container is a problem, Lua's empty table fits both", "[base][reflect]") {
    std::vector<Problem> problems;
    read({{"inner", Json::array()}, {"list", Json::object()}, {"maybe", Json::object()}}, problems);
    CHECK(problems.empty());
    read({{"inner", 3}}, problems);
    read({{"list", 3}}, problems);
    read({{"inner", {{"words", {1, 2}}}}}, problems);
    CHECK(problems.size() == 3);
    problems.clear();
    read(Json(3), problems);
    CHECK(problems.size() == 1);
}

TEST_CASE("reflect: check finds values out of range, also in lists and optional sections", "[base][reflect]") {
    Outer o;
    o.count = 0;
    o.mode = "hlaf";
    o.limit = -1;
    o.inner.factor = std::nan("");
    o.maybe = Inner{0.0, {}};
    o.list = {Inner{10.0, {}}, Inner{10.5, {}}};
    std::vector<Problem> problems;
    const auto& s = reflect::schema<Outer>();
    s.check(s.write(&o), "", problems);
    std::vector<std::string> paths;
    for (auto& p : problems) paths.push_back(p.path);
    CHECK(paths == std::vector<std::string>{"count", "mode", "limit", "inner.factor", "maybe.factor", "list[1].factor"});
    CHECK(problems[1].hint == "did you mean \"half\"?");
}

TEST_CASE("reflect: merge goes deep into objects and replaces lists", "[base][reflect]") {
    Json base = {{"a", {{"b", 1}, {"c", {1, 2}}}}, {"d", 1}};
    reflect::merge(base, {{"a", {{"c", {3}}}}, {"d", nullptr}, {"e", 2}});
    CHECK(base == Json{{"a", {{"b", 1}, {"c", {3}}}}, {"d", nullptr}, {"e", 2}});
}
