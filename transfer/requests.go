package transfer

import "github.com/vddkcp/vddkcp/source"

// Requests returns how many reads should be in progress for disks that are read at the same time.
// The parameter depth is the number of reads for one connection. Requests multiplies it by the
// largest number of connections that any of the disks can open.
func Requests(depth int, disks ...source.Disk) int {
	connections := 1
	for _, d := range disks {
		if c, ok := source.Ability[source.Counted](d); ok {
			connections = max(connections, c.Stats().Most)
		}
	}
	return depth * connections
}
