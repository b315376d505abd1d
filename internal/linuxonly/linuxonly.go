// Package linuxonly makes a build for a system other than Linux fail with a single message, which
// says that Linux is needed. Without this package, there would be many messages about missing
// system calls.
//
// A package that needs Linux imports the package linuxonly only for this message:
//
//	import _ "github.com/vddkcp/vddkcp/internal/linuxonly"
//
// The compiler does not compile a package if one of its imports failed.
package linuxonly
