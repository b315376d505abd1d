package transfer

import "github.com/vddkcp/vddkcp/source"

// Requests returns how many reads should be in progress for disks that are read at the same time.
// It multiplies the number of reads for one connection, the parameter depth, by the largest number
// of connections that one of the disks can open.
func Requests(depth int, disks ...source.Disk) int {
	connections := 1
	for _, d := range disks {
		if c, ok := source.Ability[source.Counted](d); ok {
			connections = max(connections, c.Stats().Most)
		}
	}
	return depth * connections
}
