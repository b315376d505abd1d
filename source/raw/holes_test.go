package raw

import (
	"testing"

	"golang.org/x/sys/unix"
)

func TestHoleAndData(t *testing.T) {
	type answer struct {
		off int64
		err error
	}
	const pos, size = 1000, 5000
	for _, c := range []struct {
		name       string
		data, hole answer // results of SEEK_DATA and SEEK_HOLE
		wantHole   int64
		wantData   int64
	}{
		{"data", answer{off: 1000}, answer{off: 3000}, 0, 2000},
		{"hole", answer{off: 2000}, answer{off: 3000}, 1000, 1000},
		{"hole to the end", answer{err: unix.ENXIO}, answer{}, 4000, 0},
		{"not supported", answer{err: unix.EINVAL}, answer{}, 0, 4000},
		{"not known to the file system", answer{err: unix.EOPNOTSUPP}, answer{}, 0, 4000},
		{"not known to the kernel", answer{err: unix.ENOSYS}, answer{}, 0, 4000},
		{"failed", answer{err: unix.EIO}, answer{}, 0, 4000},
		{"SEEK_HOLE failed", answer{off: 2000}, answer{err: unix.EIO}, 1000, 3000},
		{"before the question", answer{off: 0}, answer{off: 3000}, 0, 4000},
		{"punched meanwhile", answer{off: 2000}, answer{off: 2000}, 1000, 3000},
		{"grown, data", answer{off: 1000}, answer{off: 9000}, 0, 4000},
		{"grown, hole", answer{off: 7000}, answer{off: 9000}, 4000, 0},
	} {
		hole, data := holeAndData(pos, size, func(off int64, whence int) (int64, error) {
			switch {
			case whence == unix.SEEK_DATA && off == pos:
				return c.data.off, c.data.err
			case whence == unix.SEEK_HOLE && off == c.data.off:
				return c.hole.off, c.hole.err
			}
			t.Fatalf("%s: seek %d, %d", c.name, off, whence)
			return 0, nil
		})
		if hole != c.wantHole || data != c.wantData {
			t.Errorf("%s: a hole of %d, data of %d, want %d, %d", c.name, hole, data, c.wantHole, c.wantData)
		}
	}
}
