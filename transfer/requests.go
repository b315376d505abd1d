package transfer

import "github.com/vddkcp/vddkcp/source"

// Requests returns how many reads should be in flight for disks that are read at the
// same time: depth reads on each connection that one of them can open.
func Requests(depth int, disks ...source.Disk) int {
	connections := 1
	for _, d := range disks {
		if c, ok := source.Ability[source.Counted](d); ok {
			connections = max(connections, c.Stats().Most)
		}
	}
	return depth * connections
}
