// The C interface of libvixDiskLib.so: names, layouts and numbers, written for the stand-in. It
// is for x86-64 Linux with natural alignment. A sector has 512 bytes.
#ifndef VIXDISKLIB_H
#define VIXDISKLIB_H

#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>

typedef uint64_t VixError;

enum {
	VIX_OK = 0,
	VIX_E_FAIL = 1,
	VIX_E_OUT_OF_MEMORY = 2,
	VIX_E_INVALID_ARG = 3,
	VIX_E_FILE_NOT_FOUND = 4,
	VIX_E_OBJECT_IS_BUSY = 5,
	VIX_E_NOT_SUPPORTED = 6,
	VIX_E_FILE_ERROR = 7,
	VIX_E_DISK_FULL = 8,
	VIX_E_FILE_READ_ONLY = 11,
	VIX_E_FILE_ALREADY_EXISTS = 12,
	VIX_E_FILE_ACCESS_ERROR = 13,
	VIX_E_FILE_ALREADY_LOCKED = 15,
	VIX_E_BUFFER_TOOSMALL = 24,
	VIX_E_HOST_USER_PERMISSIONS = 3014,
	VIX_E_VM_NOT_FOUND = 4000,
	VIX_E_SNAPSHOT_NOTFOUND = 13003,
	VIX_E_HOST_REFUSED = 14009,
	VIX_E_DISK_INVAL = 16000,
	VIX_E_DISK_NOINIT = 16001,
	VIX_E_DISK_OUTOFRANGE = 16007,
	VIX_E_DISK_KEY_NOTFOUND = 16052,
	VIX_E_DISK_INVALID_CONNECTION = 16054,
	VIX_E_CANNOT_CONNECT_TO_HOST = 18000,
	VIX_ASYNC = 25000,
};

enum { CRED_UID = 1, CRED_SESSIONID = 2, CRED_TICKETID = 3, CRED_SSPI = 4 };

enum {
	OPEN_UNBUFFERED = 1,
	OPEN_SINGLE_LINK = 2,
	OPEN_READ_ONLY = 4,
	OPEN_COMPRESSION_ZLIB = 16,
	OPEN_COMPRESSION_FASTLZ = 32,
	OPEN_COMPRESSION_SKIPZ = 64,
};

typedef struct {
	char *vmxSpec;
	char *serverName;
	char *thumbPrint;
	long reserved1;
	int credType;
	union {
		struct { char *userName, *password; } uid;
		struct { char *cookie, *userName, *key; } sessionId;
		void *reserved2;
	} creds;
	uint32_t port;
	uint32_t nfcHostPort;
	char *reserved3;
	char reserved4[8];
	void *reserved5;
	union {
		struct { char *id, *datastoreMoRef, *ssId; } vStorageObject;
		struct { char *datastoreMoRef, *diskFolder; } ds;
	} spec;
	int specType;
} ConnectParams;

typedef struct {
	uint32_t cylinders, heads, sectors;
} Geometry;

typedef struct {
	Geometry biosGeo, physGeo;
	uint64_t capacity; // sectors
	int adapterType;
	int numLinks;
	char *parentFileNameHint;
	char *uuid;
	uint32_t logicalSectorSize, physicalSectorSize; // since 7.0
} Info;

typedef struct {
	uint64_t offset, length; // sectors
} Block;

typedef struct {
	uint32_t numBlocks;
	Block blocks[];
} BlockList;

typedef struct {
	int diskType;
	int adapterType;
	uint16_t hwVersion;
	uint64_t capacity; // sectors
} CreateParams;

typedef struct connection *Connection;
typedef struct handle *Handle;
typedef void LogFn(const char *fmt, va_list args);
typedef char ProgressFn(void *data, int percent);
typedef void CompletionCB(void *data, VixError result);

VixError VixDiskLib_InitEx(uint32_t major, uint32_t minor, LogFn *log, LogFn *warn, LogFn *panic, const char *libDir, const char *configFile);
void VixDiskLib_Exit(void);
char *VixDiskLib_GetErrorText(VixError err, const char *locale);
void VixDiskLib_FreeErrorText(char *text);
ConnectParams *VixDiskLib_AllocateConnectParams(void);
void VixDiskLib_FreeConnectParams(ConnectParams *params);
VixError VixDiskLib_ConnectEx(const ConnectParams *params, char readOnly, const char *snapshotRef, const char *transportModes, Connection *connection);
VixError VixDiskLib_Disconnect(Connection connection);
VixError VixDiskLib_Open(Connection connection, const char *path, uint32_t flags, Handle *handle);
VixError VixDiskLib_Close(Handle handle);
const char *VixDiskLib_GetTransportMode(Handle handle);
const char *VixDiskLib_ListTransportModes(void);
VixError VixDiskLib_GetInfo(Handle handle, Info **info);
void VixDiskLib_FreeInfo(Info *info);
VixError VixDiskLib_Read(Handle handle, uint64_t startSector, uint64_t numSectors, uint8_t *buffer);
VixError VixDiskLib_Write(Handle handle, uint64_t startSector, uint64_t numSectors, const uint8_t *buffer);
VixError VixDiskLib_ReadAsync(Handle handle, uint64_t startSector, uint64_t numSectors, uint8_t *buffer, CompletionCB *callback, void *data);
VixError VixDiskLib_WriteAsync(Handle handle, uint64_t startSector, uint64_t numSectors, const uint8_t *buffer, CompletionCB *callback, void *data);
VixError VixDiskLib_Wait(Handle handle);
VixError VixDiskLib_Flush(Handle handle);
VixError VixDiskLib_ReadMetadata(Handle handle, const char *key, char *buf, size_t bufLen, size_t *required);
VixError VixDiskLib_GetMetadataKeys(Handle handle, char *keys, size_t maxLen, size_t *required);
VixError VixDiskLib_PrepareForAccess(const ConnectParams *params, const char *identity);
VixError VixDiskLib_EndAccess(const ConnectParams *params, const char *identity);
VixError VixDiskLib_Cleanup(const ConnectParams *params, uint32_t *cleaned, uint32_t *remaining);
VixError VixDiskLib_Create(Connection connection, const char *path, const CreateParams *params, ProgressFn *progress, void *data);
VixError VixDiskLib_CheckRepair(Connection connection, const char *path, char repair);
VixError VixDiskLib_QueryAllocatedBlocks(Handle handle, uint64_t startSector, uint64_t numSectors, uint64_t chunkSize, BlockList **list);
VixError VixDiskLib_FreeBlockList(BlockList *list);

#endif
