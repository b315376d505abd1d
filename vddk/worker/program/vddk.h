/* The part of the interface of libvixDiskLib that the worker uses, for x86-64. The
 * names and layouts are those of the library. VixError and long have 64 bits. */
#ifndef VDDK_H
#define VDDK_H

#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>

typedef uint64_t VixError;
enum { VIX_OK = 0, VIX_FAIL = 1, VIX_NOT_SUPPORTED = 6, VIX_ASYNC = 25000 };

typedef void *Connection;
typedef void *Handle;
typedef void LogFn(const char *fmt, va_list args);
typedef void CompletionFn(void *data, VixError result);

enum { CREDENTIALS_UID = 1, CREDENTIALS_SESSION_ID = 2 };

typedef struct {
	char *vmxSpec;
	char *serverName;
	char *thumbPrint;
	long reserved1;
	int credType;
	union {
		struct {
			char *userName;
			char *password;
		} uid;
		struct {
			char *cookie;
			char *userName;
			char *key;
		} sessionId;
		void *reserved2;
	} creds;
	uint32_t port;
	uint32_t nfcHostPort;
	char *reserved3;
	char reserved4[8];
	void *reserved5;
	union {
		struct {
			char *id;
			char *datastoreMoRef;
			char *ssId;
		} vStorageObject;
		struct {
			char *datastoreMoRef;
			char *diskFolder;
		} ds;
	} spec;
	int specType;
} ConnectParams;

typedef struct {
	uint32_t cylinders, heads, sectors;
} Geometry;

typedef struct {
	Geometry biosGeo, physGeo;
	uint64_t capacity; /* sectors */
	int adapterType;
	int numLinks;
	char *parentFileNameHint;
	char *uuid;
	uint32_t logicalSectorSize, physicalSectorSize; /* not in the structure of versions before 7 */
} Info;

typedef struct {
	uint64_t offset, length; /* sectors */
} Block;

typedef struct {
	uint32_t numBlocks;
	Block blocks[];
} BlockList;

enum { REQUIRED = 1, OPTIONAL = 0 };

/* The functions as X(needed, result, name, arguments), in the order of
 * functions.go. */
#define VDDK_FUNCTIONS(X) \
	X(REQUIRED, VixError, InitEx, (uint32_t, uint32_t, LogFn *, LogFn *, LogFn *, const char *, const char *)) \
	X(REQUIRED, void, Exit, (void)) \
	X(REQUIRED, char *, GetErrorText, (VixError, const char *)) \
	X(REQUIRED, void, FreeErrorText, (char *)) \
	X(OPTIONAL, ConnectParams *, AllocateConnectParams, (void)) \
	X(OPTIONAL, void, FreeConnectParams, (ConnectParams *)) \
	X(REQUIRED, VixError, ConnectEx, (const ConnectParams *, char, const char *, const char *, Connection *)) \
	X(REQUIRED, VixError, Disconnect, (Connection)) \
	X(REQUIRED, VixError, Open, (Connection, const char *, uint32_t, Handle *)) \
	X(REQUIRED, VixError, Close, (Handle)) \
	X(REQUIRED, VixError, GetInfo, (Handle, Info **)) \
	X(REQUIRED, void, FreeInfo, (Info *)) \
	X(OPTIONAL, const char *, GetTransportMode, (Handle)) \
	X(OPTIONAL, const char *, ListTransportModes, (void)) \
	X(REQUIRED, VixError, Read, (Handle, uint64_t, uint64_t, uint8_t *)) \
	X(OPTIONAL, VixError, Write, (Handle, uint64_t, uint64_t, const uint8_t *)) \
	X(OPTIONAL, VixError, ReadAsync, (Handle, uint64_t, uint64_t, uint8_t *, CompletionFn *, void *)) \
	X(OPTIONAL, VixError, WriteAsync, (Handle, uint64_t, uint64_t, const uint8_t *, CompletionFn *, void *)) \
	X(OPTIONAL, VixError, Wait, (Handle)) \
	X(OPTIONAL, VixError, Flush, (Handle)) \
	X(OPTIONAL, VixError, QueryAllocatedBlocks, (Handle, uint64_t, uint64_t, uint64_t, BlockList **)) \
	X(OPTIONAL, VixError, FreeBlockList, (BlockList *)) \
	X(OPTIONAL, VixError, PrepareForAccess, (const ConnectParams *, const char *)) \
	X(OPTIONAL, VixError, EndAccess, (const ConnectParams *, const char *)) \
	X(OPTIONAL, VixError, Cleanup, (const ConnectParams *, uint32_t *, uint32_t *)) \
	X(OPTIONAL, VixError, ReadMetadata, (Handle, const char *, char *, size_t, size_t *)) \
	X(OPTIONAL, VixError, GetMetadataKeys, (Handle, char *, size_t, size_t *)) \
	X(OPTIONAL, VixError, Create, (void)) \
	X(OPTIONAL, VixError, CheckRepair, (void))

/* Pointers to the functions of the library; NULL if it lacks the function. */
struct vddk {
#define X(needed, result, name, arguments) result (*name) arguments;
	VDDK_FUNCTIONS(X)
#undef X
};

#endif
