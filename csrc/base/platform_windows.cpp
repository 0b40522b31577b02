// Platform functions for Windows. Large pages need a privilege that users normally lack, so all pages are
// small.
#define WIN32_LEAN_AND_MEAN
#define NOMINMAX
#include <windows.h>

#include <algorithm>
#include <atomic>
#include <bit>

#include "base/platform.h"

namespace nplora::platform {

namespace {

std::atomic<FaultMessage> message_of = nullptr;

// Windows refuses to truncate a mapped file, so this exception (EXCEPTION_IN_PAGE_ERROR) is raised only if a
// disk or a network fails.
LONG CALLBACK on_exception(EXCEPTION_POINTERS* exception) {
  const EXCEPTION_RECORD& record = *exception->ExceptionRecord;
  if (record.ExceptionCode != EXCEPTION_IN_PAGE_ERROR || record.NumberParameters < 2)
    return EXCEPTION_CONTINUE_SEARCH;
  const std::string_view message = message_of.load()(record.ExceptionInformation[1]);
  if (message.empty()) return EXCEPTION_CONTINUE_SEARCH;
  DWORD written;
  WriteFile(GetStdHandle(STD_ERROR_HANDLE), message.data(), static_cast<DWORD>(message.size()), &written,
            nullptr);
  TerminateProcess(GetCurrentProcess(), kFaultStatus);
  return EXCEPTION_CONTINUE_SEARCH;
}

size_t read_page_size() {
  SYSTEM_INFO info;
  GetSystemInfo(&info);
  return info.dwPageSize;
}

const size_t size_of_page = read_page_size();

}  // namespace

size_t page_size() {
  return size_of_page;
}

// The alignment is ignored: on Windows, the memory starts at a multiple of 64 KiB.
char* map_pages(size_t bytes, size_t) {
  return static_cast<char*>(VirtualAlloc(nullptr, bytes, MEM_RESERVE | MEM_COMMIT, PAGE_READWRITE));
}

void unmap_pages(void* at, size_t) {
  if (at != nullptr) VirtualFree(at, 0, MEM_RELEASE);
}

char* remap_pages(char*, size_t, size_t, size_t) {
  return nullptr;
}

void prefer_huge_pages(char*, size_t) {}

void keep_small_pages(char*, size_t) {}

std::optional<bool> can_collapse_pages(size_t) {
  return false;
}

void collapse_pages(char*, size_t) {}

bool has_threads() {
  return true;
}

void call_in_forked_child(void (*)()) {}

WithoutSignals::WithoutSignals() = default;
WithoutSignals::~WithoutSignals() = default;

// The mask covers one group of at most 64 processors. It is 0 if the process has threads in several groups.
size_t usable_processors() {
  DWORD_PTR usable = 0, all = 0;
  if (GetProcessAffinityMask(GetCurrentProcess(), &usable, &all) && usable != 0)
    return static_cast<size_t>(std::popcount(usable));
  return std::max(1u, std::thread::hardware_concurrency());
}

int current_processor() {
  return -1;
}

bool avoid_processor(std::span<const Thread>, int) {
  return false;
}

void explain_faults(FaultMessage find) {
  if (message_of.exchange(find) == nullptr) AddVectoredExceptionHandler(1, &on_exception);
}

bool offers_tiles() {
  return false;
}

bool request_tiles() {
  return false;
}

bool has_arm_dot_products() {
  return false;
}

bool has_arm_bf16() {
  return false;
}

bool has_arm_i8mm() {
  return false;
}

}  // namespace nplora::platform
