/* Kills the process at its n-th change of the disk below a folder; preloaded, so that nothing written in C escapes it.

   armed(n, how, folder) begins to count calls that change files or names. How it ends: KILLED, before the n-th call, what
   was written before is kept; TORN and LOST, after it, as in a power cut: of what no fsync has put on the disk a half is
   gone, or all. Names survive; unsynced() counts the files, and the folders of names, with changes that were not put on
   the disk. The real disk is not waited for. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <fcntl.h>
#include <limits.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

enum { KILLED, TORN, LOST };
enum { MOST = 256, DIED = 77 };

static struct entry {
    dev_t device;
    ino_t inode;
    off_t synced; /* bytes of it that are on the disk; -1: a folder */
    int descriptor;
    int dirty;
} table[MOST];
static int used, calls, due, manner;
static char folder[PATH_MAX];

#define REAL(name) ((__typeof__(&name))dlsym(RTLD_NEXT, #name))

void armed(int at, int how, const char *under) {
    due = at, manner = how, calls = used = 0;
    snprintf(folder, sizeof folder, "%s", under);
}

int unsynced(void) {
    int found = 0;
    for (int i = 0; i < used; i++) found += table[i].dirty;
    return found;
}

static int under(const char *path) { return folder[0] && strncmp(path, folder, strlen(folder)) == 0; }

static int path_of(int descriptor, char *path) {
    char link[64];
    snprintf(link, sizeof link, "/proc/self/fd/%d", descriptor);
    ssize_t length = readlink(link, path, PATH_MAX - 1);
    path[length < 0 ? 0 : length] = 0;
    return length > 0;
}

static int resolved(int at, const char *given, char *path) {
    char base[PATH_MAX];
    if (given[0] == '/' || at == AT_FDCWD) return snprintf(path, PATH_MAX, "%s", given), under(path);
    if (!path_of(at, base)) return 0;
    int length = snprintf(path, PATH_MAX, "%s/%s", base, given);
    return length < PATH_MAX && under(path);
}

static struct entry *entry_of(const struct stat *about) {
    for (int i = 0; i < used; i++)
        if (table[i].device == about->st_dev && table[i].inode == about->st_ino) return &table[i];
    if (used == MOST) abort();
    table[used] = (struct entry){about->st_dev, about->st_ino, -1, -1, 0};
    return &table[used++];
}

/* A name in the folder of `path` has changed. */
static void renamed_in(const char *path) {
    char parent[PATH_MAX];
    struct stat about;
    snprintf(parent, sizeof parent, "%s", path);
    char *slash = strrchr(parent, '/');
    if (slash) *slash = 0;
    if (stat(parent, &about) == 0) entry_of(&about)->dirty = 1;
}

static void gone(const char *path) {
    struct stat about;
    if (lstat(path, &about) == 0 && (about.st_nlink == 1 || S_ISDIR(about.st_mode)))
        for (int i = 0; i < used; i++)
            if (table[i].device == about.st_dev && table[i].inode == about.st_ino) table[i].dirty = 0;
}

static void written(int descriptor, off_t before) {
    struct stat about;
    if (fstat(descriptor, &about) != 0 || !S_ISREG(about.st_mode)) return;
    struct entry *found = entry_of(&about);
    if (found->descriptor < 0) found->descriptor = dup(descriptor);
    if (found->synced < 0) found->synced = before;
    found->dirty = 1;
}

static off_t size_of(int descriptor) {
    struct stat about;
    return fstat(descriptor, &about) == 0 ? about.st_size : 0;
}

static void die(void) {
    for (int i = 0; manner != KILLED && i < used; i++) {
        struct entry *one = &table[i];
        if (!one->dirty || one->descriptor < 0) continue;
        off_t size = size_of(one->descriptor);
        off_t left = one->synced + (manner == TORN ? (size - one->synced) / 2 : 0);
        if (left < size) REAL(ftruncate)(one->descriptor, left);
    }
    _exit(DIED);
}

static int now(void) {
    calls++;
    if (calls == due && manner == KILLED) die();
    return calls == due;
}

#define DO(type, call)             \
    int last = now();              \
    type result = (call);

#define END                        \
    if (last) die();               \
    return result;

static int counts(int descriptor) {
    char path[PATH_MAX];
    return due && path_of(descriptor, path) && under(path);
}

#define WRITER(name, parameters, arguments)                            \
    ssize_t name parameters {                                          \
        if (!counts(descriptor)) return REAL(name) arguments;          \
        off_t before = size_of(descriptor);                            \
        DO(ssize_t, REAL(name) arguments)                              \
        written(descriptor, before);                                   \
        END                                                            \
    }

WRITER(write, (int descriptor, const void *data, size_t count), (descriptor, data, count))
WRITER(pwrite, (int descriptor, const void *data, size_t count, off_t at), (descriptor, data, count, at))
WRITER(pwrite64, (int descriptor, const void *data, size_t count, off64_t at), (descriptor, data, count, at))

struct iovec;
WRITER(writev, (int descriptor, const struct iovec *parts, int count), (descriptor, parts, count))

#define CUTTER(name, offset)                                           \
    int name(int descriptor, offset length) {                          \
        if (!counts(descriptor)) return REAL(name)(descriptor, length);\
        off_t before = size_of(descriptor);                            \
        DO(int, REAL(name)(descriptor, length))                        \
        written(descriptor, before < length ? before : length);        \
        END                                                            \
    }

CUTTER(ftruncate, off_t)
CUTTER(ftruncate64, off64_t)

#define SYNCER(name)                                                   \
    int name(int descriptor) {                                         \
        if (!counts(descriptor)) return REAL(name)(descriptor);        \
        DO(int, 0)                                                     \
        struct stat about;                                             \
        if (fstat(descriptor, &about) == 0) {                          \
            struct entry *found = entry_of(&about);                    \
            found->dirty = 0;                                          \
            if (S_ISREG(about.st_mode)) found->synced = about.st_size; \
        }                                                              \
        END                                                            \
    }

SYNCER(fsync)
SYNCER(fdatasync)

static int opened(int result, const char *path, int flags, int existed) {
    if (result < 0) return result;
    if (flags & O_TRUNC) written(result, 0);
    if (!existed && (flags & O_TMPFILE) != O_TMPFILE) renamed_in(path);
    return result;
}

#define OPENER(name, first, given, at, path)                                                     \
    int name(first const char *path, int flags, ...) {                                           \
        va_list list;                                                                            \
        va_start(list, flags);                                                                   \
        int mode = flags & (O_CREAT | O_TMPFILE) ? va_arg(list, int) : 0;                        \
        va_end(list);                                                                            \
        char whole[PATH_MAX];                                                                    \
        if (!due || !(flags & (O_CREAT | O_TRUNC)) || !resolved(at, path, whole))                \
            return REAL(name)(given path, flags, mode);                                          \
        int existed = access(whole, F_OK) == 0;                                                  \
        DO(int, opened(REAL(name)(given path, flags, mode), whole, flags, existed))              \
        END                                                                                      \
    }

#define NOTHING
#define COMMA ,
OPENER(open, NOTHING, NOTHING, AT_FDCWD, path)
OPENER(open64, NOTHING, NOTHING, AT_FDCWD, path)
OPENER(openat, int directory COMMA, directory COMMA, directory, path)
OPENER(openat64, int directory COMMA, directory COMMA, directory, path)

static int moved(int result, const char *from, const char *to) {
    if (result == 0) renamed_in(to), renamed_in(from);
    return result;
}

int rename(const char *from, const char *to) {
    if (!due || !under(to)) return REAL(rename)(from, to);
    DO(int, moved(REAL(rename)(from, to), from, to))
    END
}

int renameat(int old, const char *from, int new, const char *to) {
    char source[PATH_MAX], target[PATH_MAX];
    if (!due || !resolved(new, to, target)) return REAL(renameat)(old, from, new, to);
    resolved(old, from, source);
    DO(int, moved(REAL(renameat)(old, from, new, to), source, target))
    END
}

static int linked(int result, const char *to) {
    if (result == 0) renamed_in(to);
    return result;
}

int link(const char *from, const char *to) {
    if (!due || !under(to)) return REAL(link)(from, to);
    DO(int, linked(REAL(link)(from, to), to))
    END
}

int linkat(int old, const char *from, int new, const char *to, int flags) {
    char target[PATH_MAX];
    if (!due || !resolved(new, to, target)) return REAL(linkat)(old, from, new, to, flags);
    DO(int, linked(REAL(linkat)(old, from, new, to, flags), target))
    END
}

int mkdir(const char *path, mode_t mode) {
    if (!due || !under(path)) return REAL(mkdir)(path, mode);
    DO(int, linked(REAL(mkdir)(path, mode), path))
    END
}

/* That a name is gone need not be on the disk: what it was is not the value any more. */
static int removed(int at, const char *path, int flags) {
    char whole[PATH_MAX];
    if (resolved(at, path, whole)) gone(whole);
    return REAL(unlinkat)(at, path, flags);
}

int unlink(const char *path) {
    if (!due || !under(path)) return REAL(unlink)(path);
    DO(int, removed(AT_FDCWD, path, 0))
    END
}

int rmdir(const char *path) {
    if (!due || !under(path)) return REAL(rmdir)(path);
    DO(int, removed(AT_FDCWD, path, AT_REMOVEDIR))
    END
}

int unlinkat(int at, const char *path, int flags) {
    char whole[PATH_MAX];
    if (!due || !resolved(at, path, whole)) return REAL(unlinkat)(at, path, flags);
    DO(int, removed(at, path, flags))
    END
}
