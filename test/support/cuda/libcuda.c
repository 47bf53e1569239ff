/* A CUDA driver without a GPU: what `CudaDriver` calls, on the memory of a file.

   Handles are ranges of one memory file and mappings are real mappings of it, so that a handle that
   is mapped twice shows the same bytes at both addresses. Streams do what they are given at once.
   Every call is counted and logged; one of them can be told to refuse. Loaded under cuda-python's
   bindings (libcuda_under_bindings.py). Not thread-safe. */

#define _GNU_SOURCE
#include <stdint.h>
#include <stdio.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

typedef int CUresult;
typedef uint64_t CUdeviceptr;
typedef unsigned long long Handle;

enum { OK = 0, INVALID_VALUE = 1, OUT_OF_MEMORY = 2, NOT_FOUND = 500, NOT_READY = 600 };
enum { MOST = 1 << 16, LOG = 1 << 20 };
static const size_t GRANULARITY = 2 << 20;

struct Range { CUdeviceptr at; size_t n; Handle handle; int access; };
static struct Range reserved[MOST], mapped[MOST];
static struct { size_t offset, n; int alive; } handles[MOST];
static int reservations, mappings, last_handle, events, file = -1;
static size_t file_size;

static char log_text[LOG];
static size_t log_used;
static char refused[64];
static int refused_after, refused_status, remaps = 1, event_status = OK;

/* ---- for tests */
void fake_refuse(const char *name, int after, int status) {
  snprintf(refused, sizeof refused, "%s", name);
  refused_after = after;
  refused_status = status;
}
void fake_remaps(int yes) { remaps = yes; }
void fake_events(int status) { event_status = status; }
const char *fake_log(void) { return log_text; }
void fake_clear(void) { log_used = 0; log_text[0] = 0; refused[0] = 0; remaps = 1; event_status = OK; }
/* What is left: reservations, mappings, events and living handles. */
int fake_left(void) {
  int alive = 0;
  for (int i = 1; i <= last_handle; i++) alive += handles[i].alive;
  return reservations + mappings + events + alive;
}

/* Start afresh, whatever was left. */
void fake_forget(void) {
  reservations = mappings = events = last_handle = 0;
}

static CUresult called(const char *name, const char *arguments) {
  if (log_used + 200 < LOG)
    log_used += (size_t)snprintf(log_text + log_used, LOG - log_used, "%s(%s)\n", name, arguments);
  if (!strcmp(refused, name) && refused_after-- <= 0) {
    refused[0] = 0;
    return refused_status;
  }
  return OK;
}
#define CALLED(...)                                                   \
  do {                                                                \
    char text[160];                                                   \
    snprintf(text, sizeof text, __VA_ARGS__);                         \
    CUresult answer = called(__func__, text);                         \
    if (answer) return answer;                                        \
  } while (0)

static int whole(CUdeviceptr at, size_t n) { return n && at % GRANULARITY == 0 && n % GRANULARITY == 0; }
static struct Range *containing(struct Range *of, int count, CUdeviceptr at, size_t n) {
  for (int i = 0; i < count; i++)
    if (of[i].at <= at && at + n <= of[i].at + of[i].n) return &of[i];
  return 0;
}
/* Bytes of [at, at + n) that mappings cover; -1: one of them is cut. */
static int64_t covered(CUdeviceptr at, size_t n) {
  int64_t sum = 0;
  for (int i = 0; i < mappings; i++) {
    struct Range m = mapped[i];
    if (m.at >= at + n || at >= m.at + m.n) continue;
    if (m.at < at || m.at + m.n > at + n) return -1;
    sum += (int64_t)m.n;
  }
  return sum;
}

/* ---- the driver */
CUresult cuInit(unsigned flags) { CALLED("%u", flags); return OK; }
CUresult cuDriverGetVersion(int *version) { *version = 13000; return OK; }
CUresult cuDeviceGet(int *device, int ordinal) { CALLED("%d", ordinal); *device = ordinal; return OK; }
CUresult cuDeviceGetAttribute(int *value, int attribute, int device) {
  CALLED("%d, %d", attribute, device);
  *value = remaps;
  return OK;
}
CUresult cuMemGetAllocationGranularity(size_t *size, const void *property, int option) {
  const int *words = property;
  CALLED("type %d, location %d %d, option %d", words[0], words[2], words[3], option);
  *size = GRANULARITY;
  return OK;
}
CUresult cuMemAddressReserve(CUdeviceptr *at, size_t n, size_t align, CUdeviceptr hint, unsigned long long flags) {
  CALLED("%zu, %zu, %llx, %llu", n, align, (unsigned long long)hint, flags);
  if (!n || n % GRANULARITY || reservations == MOST) return INVALID_VALUE;
  char *got = mmap(0, n + GRANULARITY, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (got == MAP_FAILED) return OUT_OF_MEMORY;
  uintptr_t start = ((uintptr_t)got + GRANULARITY - 1) / GRANULARITY * GRANULARITY;
  if (start > (uintptr_t)got) munmap(got, start - (uintptr_t)got);
  size_t behind = GRANULARITY - (start - (uintptr_t)got);
  if (behind) munmap((char *)start + n, behind);
  reserved[reservations++] = (struct Range){start, n, 0, 0};
  *at = start;
  return OK;
}
CUresult cuMemAddressFree(CUdeviceptr at, size_t n) {
  CALLED("%llx, %zu", (unsigned long long)at, n);
  struct Range *found = containing(reserved, reservations, at, n);
  if (!found || found->at != at || found->n != n || covered(at, n)) return INVALID_VALUE;
  munmap((void *)(uintptr_t)at, n);
  *found = reserved[--reservations];
  return OK;
}
CUresult cuMemCreate(Handle *handle, size_t n, const void *property, unsigned long long flags) {
  const int *words = property;
  CALLED("%zu, type %d, location %d %d, %llu", n, words[0], words[2], words[3], flags);
  if (!n || n % GRANULARITY || last_handle + 1 == MOST) return INVALID_VALUE;
  if (file < 0) file = memfd_create("device", 0);
  *handle = (Handle)++last_handle;
  handles[last_handle].offset = file_size;
  handles[last_handle].n = n;
  handles[last_handle].alive = 1;
  file_size += n;
  if (ftruncate(file, (off_t)file_size)) return OUT_OF_MEMORY;
  return OK;
}
CUresult cuMemRelease(Handle handle) {
  CALLED("%llu", handle);
  if (!handle || handle > (Handle)last_handle || !handles[handle].alive) return INVALID_VALUE;
  handles[handle].alive = 0;
  return OK;
}
CUresult cuMemMap(CUdeviceptr at, size_t n, size_t offset, Handle handle, unsigned long long flags) {
  CALLED("%llx, %zu, %zu, %llu, %llu", (unsigned long long)at, n, offset, handle, flags);
  if (!whole(at, n) || offset || flags || !containing(reserved, reservations, at, n) || covered(at, n))
    return INVALID_VALUE;
  if (!handle || handle > (Handle)last_handle || !handles[handle].alive || handles[handle].n != n)
    return INVALID_VALUE;
  if (mappings == MOST) return OUT_OF_MEMORY;
  void *got = mmap((void *)(uintptr_t)at, n, PROT_NONE, MAP_SHARED | MAP_FIXED, file, (off_t)handles[handle].offset);
  if (got == MAP_FAILED) return OUT_OF_MEMORY;
  mapped[mappings++] = (struct Range){at, n, handle, 0};
  return OK;
}
CUresult cuMemUnmap(CUdeviceptr at, size_t n) {
  CALLED("%llx, %zu", (unsigned long long)at, n);
  if (!whole(at, n) || covered(at, n) != (int64_t)n) return INVALID_VALUE;
  for (int i = mappings - 1; i >= 0; i--)
    if (mapped[i].at >= at && mapped[i].at < at + n) mapped[i] = mapped[--mappings];
  mmap((void *)(uintptr_t)at, n, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE | MAP_FIXED, -1, 0);
  return OK;
}
CUresult cuMemSetAccess(CUdeviceptr at, size_t n, const void *access, size_t count) {
  const int *words = access;
  CALLED("%llx, %zu, location %d %d, flags %d, %zu", (unsigned long long)at, n, words[0], words[1], words[2], count);
  if (covered(at, n) != (int64_t)n || words[2] != 3 || count != 1) return INVALID_VALUE;
  for (int i = 0; i < mappings; i++)
    if (mapped[i].at >= at && mapped[i].at < at + n) mapped[i].access = 1;
  return mprotect((void *)(uintptr_t)at, n, PROT_READ | PROT_WRITE) ? INVALID_VALUE : OK;
}
CUresult cuEventCreate(void **event, unsigned flags) {
  CALLED("%u", flags);
  events++;
  *event = (void *)(uintptr_t)(0x1000 + events);
  return OK;
}
CUresult cuEventDestroy_v2(void *event) {
  CALLED("%p", event);
  events--;
  return OK;
}
CUresult cuEventRecord(void *event, void *stream) { CALLED("%p, %p", event, stream); return OK; }
CUresult cuEventQuery(void *event) { CALLED("%p", event); return event_status; }
CUresult cuEventSynchronize(void *event) { CALLED("%p", event); return OK; }
CUresult cuStreamWaitEvent(void *stream, void *event, unsigned flags) {
  CALLED("%p, %p, %u", stream, event, flags);
  return OK;
}
CUresult cuMemsetD8Async(CUdeviceptr at, unsigned char value, size_t n, void *stream) {
  CALLED("%llx, %u, %zu, %p", (unsigned long long)at, value, n, stream);
  for (CUdeviceptr byte = at; byte < at + n;) { /* every part must be mapped and open */
    struct Range *m = containing(mapped, mappings, byte, 1);
    if (!m || !m->access) return INVALID_VALUE;
    byte = m->at + m->n;
  }
  memset((void *)(uintptr_t)at, value, n);
  return OK;
}

#define NAMED(name, function) {name, (void *)function}
static const struct { const char *name; void *function; } calls[] = {
  NAMED("cuInit", cuInit), NAMED("cuDriverGetVersion", cuDriverGetVersion), NAMED("cuDeviceGet", cuDeviceGet),
  NAMED("cuDeviceGetAttribute", cuDeviceGetAttribute),
  NAMED("cuMemGetAllocationGranularity", cuMemGetAllocationGranularity),
  NAMED("cuMemAddressReserve", cuMemAddressReserve), NAMED("cuMemAddressFree", cuMemAddressFree),
  NAMED("cuMemCreate", cuMemCreate), NAMED("cuMemRelease", cuMemRelease), NAMED("cuMemMap", cuMemMap),
  NAMED("cuMemUnmap", cuMemUnmap), NAMED("cuMemSetAccess", cuMemSetAccess),
  NAMED("cuEventCreate", cuEventCreate), NAMED("cuEventDestroy", cuEventDestroy_v2),
  NAMED("cuEventRecord", cuEventRecord), NAMED("cuEventQuery", cuEventQuery),
  NAMED("cuEventSynchronize", cuEventSynchronize), NAMED("cuStreamWaitEvent", cuStreamWaitEvent),
  NAMED("cuMemsetD8Async", cuMemsetD8Async),
};
CUresult cuGetProcAddress_v2(const char *name, void **function, int version, uint64_t flags, int *status) {
  (void)version, (void)flags;
  *function = !strcmp(name, "cuGetProcAddress") ? (void *)cuGetProcAddress_v2 : 0;
  for (size_t i = 0; i < sizeof calls / sizeof *calls; i++)
    if (!strcmp(calls[i].name, name)) *function = calls[i].function;
  if (status) *status = *function ? 0 : 1;
  return *function ? OK : NOT_FOUND;
}
CUresult cuGetProcAddress(const char *name, void **function, int version, uint64_t flags) {
  return cuGetProcAddress_v2(name, function, version, flags, 0);
}
