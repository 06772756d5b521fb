// A wall clock that can be set without setting the machine's: preloaded, it adds the nanoseconds in the file that
// PSYCHE_TEST_CLOCK names to CLOCK_REALTIME. All other clocks are as they are.

#include <dlfcn.h>
#include <fcntl.h>
#include <sys/mman.h>
#include <sys/time.h>
#include <time.h>
#include <unistd.h>

#include <cstdint>
#include <cstdlib>

namespace {

using Get = int (*)(clockid_t, timespec *);

constexpr int64_t SECOND = 1'000'000'000;

const volatile int64_t *offset = nullptr;

Get real() {
    static const Get found = reinterpret_cast<Get>(dlsym(RTLD_NEXT, "clock_gettime"));
    return found;
}

__attribute__((constructor)) void open_clock() {
    const char *path = std::getenv("PSYCHE_TEST_CLOCK");
    if (path == nullptr) return;
    const int file = open(path, O_RDONLY | O_CLOEXEC);
    if (file < 0) return;
    void *mapped = mmap(nullptr, sizeof(int64_t), PROT_READ, MAP_SHARED, file, 0);
    close(file);
    if (mapped != MAP_FAILED) offset = static_cast<const volatile int64_t *>(mapped);
}

}  // namespace

extern "C" int clock_gettime(clockid_t clock, timespec *time) noexcept {
    const int result = real()(clock, time);
    if (result == 0 && offset != nullptr && (clock == CLOCK_REALTIME || clock == CLOCK_REALTIME_COARSE)) {
        const int64_t now = time->tv_sec * SECOND + time->tv_nsec + *offset;
        time->tv_sec = now / SECOND;
        time->tv_nsec = now % SECOND;
    }
    return result;
}

extern "C" int gettimeofday(timeval *time, void *) noexcept {
    timespec now{};
    const int result = clock_gettime(CLOCK_REALTIME, &now);
    if (time != nullptr) {
        time->tv_sec = now.tv_sec;
        time->tv_usec = now.tv_nsec / 1000;
    }
    return result;
}

extern "C" time_t time(time_t *out) noexcept {
    timespec now{};
    clock_gettime(CLOCK_REALTIME, &now);
    if (out != nullptr) *out = now.tv_sec;
    return now.tv_sec;
}
