// Package linuxonly makes a build for a system other than Linux fail with a single message, which
// says that Linux is needed. Without this package, there would be many messages about missing
// system calls.
//
// A package that needs Linux imports the package linuxonly only for this message:
//
//	import _ "github.com/vddkcp/vddkcp/internal/linuxonly"
//
// If the import fails, the compiler does not compile the package that contains it. Therefore it
// prints no messages about that package.
package linuxonly
