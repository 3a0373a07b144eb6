// How an op refuses its arguments: ValueError for values, TypeError for kinds, never torch's own prefixed text. Every
// check says `<op>: <what> must <contract>, got <value>`, and how to mend it where that is known.
#pragma once

#include <pybind11/pybind11.h>

#include <sstream>
#include <stdexcept>
#include <string>

namespace nf4lora {

template <class... Parts>
std::string text(const Parts&... parts) {
  std::ostringstream out;
  (out << ... << parts);
  return out.str();
}

template <class... Parts>
void require_value(bool held, const Parts&... parts) {
  if (!held) throw std::invalid_argument(text(parts...));
}

template <class... Parts>
void require_kind(bool held, const Parts&... parts) {
  if (!held) throw pybind11::type_error(text(parts...));
}

}  // namespace nf4lora
