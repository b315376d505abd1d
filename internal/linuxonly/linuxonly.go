// Package linuxonly makes a build for a system other than Linux fail with a single message that
// says so. Without it, there would be many messages about missing system calls.
//
// A package that needs Linux imports it only for that effect:
//
//	import _ "github.com/vddkcp/vddkcp/internal/linuxonly"
//
// The compiler does not compile a package if one of its imports failed.
package linuxonly
