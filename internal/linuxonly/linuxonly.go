// Package linuxonly makes a build for a system other than Linux fail with one
// message that says so, instead of many about system calls that are missing.
//
// A package that needs Linux imports it for that effect:
//
//	import _ "github.com/vddkcp/vddkcp/internal/linuxonly"
//
// The compiler does not go on to a package when one of its imports failed.
package linuxonly
