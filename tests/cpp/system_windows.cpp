#define WIN32_LEAN_AND_MEAN
#define NOMINMAX
#include <windows.h>

#include <cstdio>
#include <cstdlib>

#include "system.h"

namespace test_system {

namespace {

const char* text_of_crash = "";

LONG WINAPI report(EXCEPTION_POINTERS* exception) {
  std::fprintf(stderr, "\nCRASH (exception %#lx) in %s\n", exception->ExceptionRecord->ExceptionCode,
               text_of_crash);
  TerminateProcess(GetCurrentProcess(), 1);
  return EXCEPTION_EXECUTE_HANDLER;
}

}  // namespace

size_t page_size() {
  static const size_t size = [] {
    SYSTEM_INFO info;
    GetSystemInfo(&info);
    return info.dwPageSize;
  }();
  return size;
}

// Reserved pages that are not committed cannot be read or written.
unsigned char* map_between_guards(size_t bytes) {
  void* all = VirtualAlloc(nullptr, bytes + 2 * page_size(), MEM_RESERVE, PAGE_NOACCESS);
  void* pages = static_cast<unsigned char*>(all) + page_size();
  if (all == nullptr || VirtualAlloc(pages, bytes, MEM_COMMIT, PAGE_READWRITE) != pages) {
    std::fprintf(stderr, "guarded buffer: error %lu\n", GetLastError());
    std::exit(2);
  }
  return static_cast<unsigned char*>(pages);
}

void report_crashes(const char* current) {
  text_of_crash = current;
  SetUnhandledExceptionFilter(report);
}

// Windows has no fork, so the child process is this program with the argument --table.
std::string table_in_child(const char* isa) {
  char program[MAX_PATH];
  if (GetModuleFileNameA(nullptr, program, sizeof program) == sizeof program) return "the path is too long";
  _putenv_s("NPLORA_ISA", isa ? isa : "");
  std::FILE* child = _popen(("\"\"" + std::string(program) + "\" --table\"").c_str(), "rb");
  _putenv_s("NPLORA_ISA", "");
  if (child == nullptr) return "no process";
  char answer[512] = {};
  std::fread(answer, 1, sizeof answer - 1, child);
  _pclose(child);
  return answer;
}

}  // namespace test_system
