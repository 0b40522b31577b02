// What the kernel tests need of the operating system.
#pragma once

#include <cstddef>
#include <string>

namespace test_system {

size_t page_size();

// Whole pages between two pages that cannot be read or written. Ends the program if there is no memory.
unsigned char* map_between_guards(size_t bytes);

// On a fault, print it with the text at `current`, and end the program with status 1.
void report_crashes(const char* current);

// What chosen_table() returns in a new process with NPLORA_ISA=isa; nullptr: without this variable.
std::string table_in_child(const char* isa);

// The name of the table that this process chooses, or the error message.
std::string chosen_table();

}  // namespace test_system
