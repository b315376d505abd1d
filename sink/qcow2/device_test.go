package qcow2

import (
	"bytes"
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/vddkcp/vddkcp/internal/peer"
	"github.com/vddkcp/vddkcp/sink"
)

// A resumed image on a device has nothing of what the device had before: neither
// of another image by the same writer, whose L1 table lies in the same place, nor
// of anything else there.
func TestResumeOnUsedDevice(t *testing.T) {
	peer.NeedRoot(t)
	peer.Need(t, "losetup", "qemu-img")
	const mib = 1 << 20
	const size = 12 * mib // an L2 table maps 2 MiB
	o := Options{ClusterSize: 4096}
	for _, before := range []string{"another image", "ones"} {
		for _, at := range []int64{8 * mib, 9 * mib} {
			backing := filepath.Join(t.TempDir(), "device")
			if err := os.WriteFile(backing, bytes.Repeat([]byte{0xff}, 24*mib), 0o600); err != nil {
				t.Fatal(err)
			}
			device := strings.TrimSpace(peer.Run(t, "losetup", "--find", "--show", backing))
			t.Cleanup(func() { peer.Run(t, "losetup", "--detach", device) })
			if before == "another image" {
				d, err := Create(t.Context(), device, size, o)
				if err != nil {
					t.Fatal(err)
				}
				// Its last tables lie below where the next image's checkpoint ends.
				for _, off := range []int64{0, 2 * mib, 4 * mib, 6 * mib, 8 * mib, 10 * mib} {
					if _, err := d.WriteAt(fragments(90, 16<<10), off); err != nil {
						t.Fatal(err)
					}
				}
				if err := errors.Join(d.Finish(t.Context()), d.Publish(t.Context())); err != nil {
					t.Fatal(err)
				}
			}
			content := make([]byte, size)
			copy(content, fragments(91, mib))
			d, err := Create(t.Context(), device, size, o)
			if err != nil {
				t.Fatal(err)
			}
			if _, err := d.WriteAt(content[:mib], 0); err != nil {
				t.Fatal(err)
			}
			if err := d.ZeroAt(t.Context(), mib, at-mib); err != nil {
				t.Fatal(err)
			}
			state, sync, err := d.Checkpoint(at)
			if err := errors.Join(err, sync(t.Context()), d.Suspend()); err != nil {
				t.Fatal(err)
			}
			next := o
			next.State, next.Resume = state, at
			if d, err = Create(t.Context(), device, size, next); err != nil {
				t.Errorf("on a device with %s, resumed at %d: %v", before, at, err)
				continue
			}
			// The copy reads back what the checkpoint says is there.
			r, _ := sink.Ability[sink.Readback](d)
			if got := make([]byte, at); true {
				if _, err := r.ReadAt(got, 0); err != nil || !bytes.Equal(got, content[:at]) {
					t.Errorf("on a device with %s, resumed at %d: read back: %v", before, at, err)
				}
			}
			if err := errors.Join(d.ZeroAt(t.Context(), at, size-at), d.Finish(t.Context()), d.Publish(t.Context())); err != nil {
				t.Fatal(err)
			}
			if !bytes.Equal(read(t, device, nil), content) {
				t.Errorf("on a device with %s, resumed at %d: stale data shows", before, at)
			}
			peer.Run(t, "qemu-img", "check", "-q", "-f", "qcow2", device)
		}
	}
}
