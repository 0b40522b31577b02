#include <signal.h>
#include <sys/mman.h>
#include <sys/wait.h>
#include <unistd.h>

#include <cstdio>
#include <cstdlib>
#include <cstring>

#include "system.h"

namespace test_system {

namespace {

const char* text_of_crash = "";

void report(int signal) {
  const char* parts[] = {"\nCRASH (", strsignal(signal), ") in ", text_of_crash, "\n"};
  for (const char* part : parts)
    if (write(STDERR_FILENO, part, strlen(part)) < 0) break;
  _exit(1);
}

}  // namespace

size_t page_size() {
  static const size_t size = static_cast<size_t>(sysconf(_SC_PAGESIZE));
  return size;
}

unsigned char* map_between_guards(size_t bytes) {
  void* all = mmap(nullptr, bytes + 2 * page_size(), PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  unsigned char* pages = static_cast<unsigned char*>(all) + page_size();
  if (all == MAP_FAILED || mprotect(pages, bytes, PROT_READ | PROT_WRITE) != 0) {
    perror("guarded buffer");
    std::exit(2);
  }
  return pages;
}

void report_crashes(const char* current) {
  text_of_crash = current;
  struct sigaction action = {};
  action.sa_handler = report;
  for (int signal : {SIGSEGV, SIGBUS, SIGILL, SIGFPE}) sigaction(signal, &action, nullptr);
}

std::string table_in_child(const char* isa) {
  int ends[2];
  if (pipe(ends) != 0) return "no pipe";
  const pid_t child = fork();
  if (child == 0) {
    isa ? setenv("NPLORA_ISA", isa, 1) : unsetenv("NPLORA_ISA");
    const std::string answer = chosen_table();
    _exit(write(ends[1], answer.data(), answer.size()) == static_cast<ssize_t>(answer.size()) ? 0 : 1);
  }
  close(ends[1]);
  char answer[512] = {};
  size_t size = 0;
  for (ssize_t got; (got = read(ends[0], answer + size, sizeof answer - 1 - size)) > 0;)
    size += static_cast<size_t>(got);
  close(ends[0]);
  waitpid(child, nullptr, 0);
  return answer;
}

}  // namespace test_system
