// Reflection of plain structs: a struct's fields are listed once, in one schema<T>() function, and reading, writing, checking,
// help and listings all walk that list.
//
//   template <> const Schema& schema<Point>() {
//       static const Schema s("point", {field("x", &Point::x).unit("m").min(0).help("Distance from the wall.")});
//       return s;
//   }
//
// Field types: bool, int64_t, double, std::string, another reflected struct, std::optional of these (null in JSON), and
// std::vector of strings or of reflected structs. Include it in .cpp files only: it brings the whole JSON library.
#pragma once
#include "core/base/problem.h"

#include <nlohmann/json.hpp>

#include <concepts>
#include <functional>
#include <limits>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

namespace moe::reflect {

using Json = nlohmann::json;
using OrderedJson = nlohmann::ordered_json;

class Schema;

/// The field list of T; every reflected struct specialises it.
template <class T>
const Schema& schema();

/// One key. The methods that describe it return it, so that a list reads as one line a key.
class Field {
public:
    Field&& alias(std::string name) && { return aliases.push_back(std::move(name)), std::move(*this); }
    Field&& help(std::string text) && { return help_text = std::move(text), std::move(*this); }
    Field&& unit(std::string text) && { return unit_text = std::move(text), std::move(*this); }
    /// Identifier of the feature that the key belongs to.
    Field&& row(std::string id) && { return row_id = std::move(id), std::move(*this); }
    /// The words that a text may be.
    Field&& one_of(std::vector<std::string> words) && { return choices = std::move(words), std::move(*this); }
    /// JSON's true and false stand for these words of a text.
    Field&& flag_words(std::string if_true, std::string if_false) && {
        return true_word = std::move(if_true), false_word = std::move(if_false), std::move(*this);
    }
    Field&& min(double value) && { return lowest = value, std::move(*this); }
    Field&& max(double value) && { return highest = value, std::move(*this); }
    /// Greater than, not equal to.
    Field&& above(double value) && { return lowest = value, open_low = true, std::move(*this); }
    /// Less than, not equal to.
    Field&& below(double value) && { return highest = value, open_high = true, std::move(*this); }

    std::string name;
    std::vector<std::string> aliases, choices;
    std::string help_text, unit_text, row_id, true_word, false_word;
    double lowest = -std::numeric_limits<double>::infinity(), highest = std::numeric_limits<double>::infinity();
    bool open_low = false, open_high = false;
    bool nullable = false;
    bool is_list = false;
    const char* type = "";                    ///< "integer", "number", "true or false", "text", "list of texts", "section", "list of sections"
    const Schema& (*child)() = nullptr;       ///< fields of a section or of a list's sections
    OrderedJson (*child_defaults)() = nullptr; ///< a section with its default values, also where it is null by default
    /// Sets the field of `object` from a value; a section takes the keys that are there and keeps the others.
    std::function<void(const Field&, void* object, const Json& value, const std::string& path, std::vector<Problem>&)> read;
    std::function<OrderedJson(const void* object)> write;

    /// The range in words: "1 or more", "in (0, 1]", "a, b or c"; "" for any value.
    std::string range() const;
    /// What a value must be, in words, with type and range.
    std::string want() const;
};

/// A struct's fields.
class Schema {
public:
    Schema(std::string name, std::vector<Field> fields) : name_(std::move(name)), fields_(std::move(fields)) {}
    const std::string& name() const { return name_; }
    const std::vector<Field>& fields() const { return fields_; }
    /// The field of that name or alias, else null.
    const Field* find(std::string_view key) const;

    /// The same value with canonical keys. Unknown keys, wrong containers, and a key given by two names with different values
    /// become problems; `root` is searched for the place of a key that is in the wrong section.
    Json canonical(const Json& value, const std::string& path, const Schema& root, std::vector<Problem>& problems) const;
    /// Sets the fields that `value` (canonical) has.
    void read(void* object, const Json& value, const std::string& path, std::vector<Problem>& problems) const;
    OrderedJson write(const void* object) const;
    /// Adds a problem for each value out of its range or not among its choices.
    void check(const OrderedJson& value, const std::string& path, std::vector<Problem>& problems) const;

private:
    std::string name_;
    std::vector<Field> fields_;
};

/// "a.b" from "a" and "b", "b" from "" and "b".
std::string join(const std::string& path, std::string_view key);

/// Deep merge of canonical values: objects by key, anything else is replaced.
void merge(Json& base, const Json& over);

namespace detail {
template <class T>
struct IsOptional : std::false_type {};
template <class T>
struct IsOptional<std::optional<T>> : std::true_type {};
template <class T>
struct IsVector : std::false_type {};
template <class T>
struct IsVector<std::vector<T>> : std::true_type {};
template <class T>
concept Struct = std::is_class_v<T> && !std::same_as<T, std::string> && !IsOptional<T>::value && !IsVector<T>::value;

void wrong(const Field& field, const Json& value, const std::string& path, std::vector<Problem>& problems);
void read_value(const Field& field, bool& to, const Json& value, const std::string& path, std::vector<Problem>& problems);
void read_value(const Field& field, int64_t& to, const Json& value, const std::string& path, std::vector<Problem>& problems);
void read_value(const Field& field, double& to, const Json& value, const std::string& path, std::vector<Problem>& problems);
void read_value(const Field& field, std::string& to, const Json& value, const std::string& path, std::vector<Problem>& problems);
void read_value(const Field& field, std::vector<std::string>& to, const Json& value, const std::string& path, std::vector<Problem>& problems);

template <Struct T>
void read_value(const Field& field, T& to, const Json& value, const std::string& path, std::vector<Problem>& problems) {
    if (value.is_array() && value.empty()) return;      // Lua's {} may arrive as an empty list
    if (!value.is_object()) return wrong(field, value, path, problems);
    schema<T>().read(&to, value, path, problems);
}

template <Struct T>
void read_value(const Field& field, std::vector<T>& to, const Json& value, const std::string& path, std::vector<Problem>& problems) {
    if (!value.is_array() && !(value.is_object() && value.empty())) return wrong(field, value, path, problems);
    std::vector<T> items(value.size());
    for (size_t i = 0; i < items.size(); ++i) read_value(field, items[i], value[i], path + "[" + std::to_string(i) + "]", problems);
    to = std::move(items);
}

template <class T>
void read_value(const Field& field, std::optional<T>& to, const Json& value, const std::string& path, std::vector<Problem>& problems) {
    if (value.is_null()) {
        to.reset();
        return;
    }
    T item = to.value_or(T());
    size_t before = problems.size();
    read_value(field, item, value, path, problems);
    if (problems.size() == before) to = std::move(item);
}

template <class T>
OrderedJson write_value(const T& value) {
    if constexpr (IsOptional<T>::value) {
        return value ? write_value(*value) : OrderedJson(nullptr);
    } else if constexpr (IsVector<T>::value) {
        OrderedJson list = OrderedJson::array();
        for (const auto& item : value) list.push_back(write_value(item));
        return list;
    } else if constexpr (Struct<T>) {
        return schema<T>().write(&value);
    } else {
        return value;
    }
}

template <class T>
void set_type(Field& f) {
    if constexpr (IsOptional<T>::value) {
        set_type<typename T::value_type>(f);
        f.nullable = true;
    } else if constexpr (IsVector<T>::value) {
        set_type<typename T::value_type>(f);
        f.is_list = true;
        f.type = f.child ? "list of sections" : "list of texts";
    } else if constexpr (Struct<T>) {
        f.child = &schema<T>;
        f.child_defaults = [] { return write_value(T()); };
        f.type = "section";
    } else {
        f.type = std::same_as<T, bool> ? "true or false" : std::same_as<T, int64_t> ? "integer" : std::same_as<T, double> ? "number" : "text";
    }
}
}  // namespace detail

/// A field of the struct S under the key `name`.
template <class S, class T>
Field field(std::string name, T S::* member) {
    Field f;
    f.name = std::move(name);
    detail::set_type<T>(f);
    f.read = [member](const Field& self, void* object, const Json& value, const std::string& path, std::vector<Problem>& problems) {
        detail::read_value(self, static_cast<S*>(object)->*member, value, path, problems);
    };
    f.write = [member](const void* object) { return detail::write_value(static_cast<const S*>(object)->*member); };
    return f;
}

}  // namespace moe::reflect
