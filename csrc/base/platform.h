// All functions of csrc that differ between operating systems. All other files of csrc are the same on every
// system.
//
// CMakeLists.txt compiles one file for the target system: platform_linux.cpp, platform_macos.cpp,
// platform_windows.cpp or platform_wasm.cpp. For Linux and macOS, CMakeLists.txt also compiles
// platform_posix.cpp.
#pragma once

#include <cstddef>
#include <cstdint>
#include <optional>
#include <span>
#include <string_view>
#include <thread>

namespace nplora::platform {

// ---- memory ----

size_t page_size();

// Maps whole pages. If the system supports alignment, the memory starts at a multiple of `alignment`, which
// is a power of two. On every system, the memory starts at a multiple of a cache line. Returns nullptr if
// there is no memory.
char* map_pages(size_t bytes, size_t alignment);

// Unmaps a whole mapping. On systems that support `collapse_pages`, `unmap_pages` can also unmap a part of a
// mapping.
void unmap_pages(void* at, size_t bytes);

// Changes the size of a whole mapping, and may move it. The pages within the smaller size keep their content.
// The new start is aligned as `map_pages` would align it. If the system cannot do this, `remap_pages` returns
// nullptr and changes nothing.
char* remap_pages(char* at, size_t old_bytes, size_t new_bytes, size_t alignment);

// Two requests to the system: to use huge pages, or to use small pages. If the system refuses a request, the
// program still works, but is slower or uses more memory.
void prefer_huge_pages(char* at, size_t bytes);
void keep_small_pages(char* at, size_t bytes);

// Whether `collapse_pages` can move small pages into huge pages of `huge_page` bytes. To find out, this
// function fills one huge page as a trial. The result is std::nullopt if there is no memory for the trial.
std::optional<bool> can_collapse_pages(size_t huge_page);

// Moves the content of small pages into huge pages. If the system refuses, only speed is lost.
void collapse_pages(char* at, size_t bytes);

// ---- threads ----

using Thread = std::thread::native_handle_type;

// Whether this build can start threads.
bool has_threads();

// The number of processors that this process may use, at least 1.
size_t usable_processors();

// Registers `f` to be called in every child process that is forked after this call. If there is no memory for
// the registration, forked children may hang, but nothing else fails.
void call_in_forked_child(void (*f)());

// Threads that are started during the lifetime of this object block all signals. So only the other threads of
// the process receive signals.
class WithoutSignals {
 public:
  WithoutSignals();
  ~WithoutSignals();
  WithoutSignals(const WithoutSignals&) = delete;
  WithoutSignals& operator=(const WithoutSignals&) = delete;

 private:
  [[maybe_unused]] alignas(16) unsigned char before_[128];  // the signals that were already blocked
};

// The number of the processor that runs the calling thread, or -1 if the system does not say.
int current_processor();

// Makes the system run `threads` on any processor except `processor`. Returns false if the system does not
// support this, or if the process may use no other processor.
bool avoid_processor(std::span<const Thread> threads, int processor);

// ---- faults in mapped files ----

// A function that returns the error message for a failed read at an address, or an empty text if it has none.
// The signal handler calls this function.
using FaultMessage = std::string_view (*)(uintptr_t address);

// After this call, a failed read of a mapped file calls `find` with the address of the failed read. If `find`
// returns an empty text, the failure is handled as it would be without this call. If `find` returns a
// message, it is written to stderr, and the process ends with status kFaultStatus. On Linux and macOS, the
// handler that was installed before is called in between. Call this function again before each new mapping,
// because other code may have removed the handler, as faulthandler.disable() does. In WebAssembly, this
// function does nothing.
void explain_faults(FaultMessage find);

inline constexpr int kFaultStatus = 135;  // 128 + SIGBUS on Linux; other systems use the same value

// ---- the processor ----

// `offers_tiles` returns whether the system lets processes use the tile registers of AMX, if they ask for
// permission. `request_tiles` asks for this permission, and returns false if the system refuses. After
// request_tiles, all threads of the process need larger signal stacks.
bool offers_tiles();
bool request_tiles();

// Each function returns whether an aarch64 processor has certain instructions: for dot products of bytes, for
// bfloat16, or for products of int8 matrices (I8MM).
bool has_arm_dot_products();
bool has_arm_bf16();
bool has_arm_i8mm();

}  // namespace nplora::platform
