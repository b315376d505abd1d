package vsphere

import (
	"bytes"
	"context"
	"errors"
	"os"
	"testing"
	"time"

	"github.com/vddkcp/vddkcp/nfc"
	"github.com/vddkcp/vddkcp/nfc/nfctest"
	"github.com/vddkcp/vddkcp/source"
	"github.com/vddkcp/vddkcp/vsphere/inventory"
	"github.com/vddkcp/vddkcp/vsphere/vspheretest"
)

// openNFC opens the first disk of a snapshot over NFC.
func openNFC(t *testing.T, v *VM, snapshot string) (source.Disk, error) {
	t.Helper()
	tickets := nfc.TicketsFunc(func(ctx context.Context) (nfc.Ticket, error) {
		found, err := v.FindMoref(ctx, snapshot)
		if err != nil {
			return nfc.Ticket{}, source.Permanent(err)
		}
		ticket, err := v.Ticket(ctx)
		if err != nil {
			return nfc.Ticket{}, err
		}
		ticket.File = found.Disks[0].File
		return ticket, nil
	})
	return nfc.Open(t.Context(), nfc.Params{Name: "disk", Frozen: true}, tickets, nfc.Options{
		Timeout: 10 * time.Second,
		Retry:   source.RetryOptions{Retries: 3, Backoff: func(int) time.Duration { return time.Millisecond }},
	})
}

// TestNFC reads the disk of a snapshot over NFC, while its VM is moved, and then removes the snapshot.
func TestNFC(t *testing.T) {
	t.Parallel()
	for name, profile := range map[string]nfctest.Profile{"8": nfctest.ESXi8, "7.0.3": nfctest.ESXi703} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			server := vspheretest.New(t, vspheretest.WithNFC(), vspheretest.Datastore{Name: "ds 2/a"},
				vspheretest.VM{Name: "web01", Disks: []vspheretest.Disk{{Size: 4 << 20}}},
				vspheretest.Configure(func(o *vspheretest.Options) {
					o.NFC = func(_ string, o *nfctest.Options) { o.Profile, o.Shuffle = profile, true }
				}))
			image := server.Image("web01", 1)
			want, err := os.ReadFile(image)
			if err != nil {
				t.Fatal(err)
			}
			snapshot := server.AddSnapshot("web01", "a", "").Value
			server.Write("web01", 1, []byte("written after the snapshot"), 0)
			v := findVM(t, server, "web01")
			disk, err := openNFC(t, v, snapshot)
			if err != nil {
				t.Fatal(err)
			}
			defer disk.Close()
			read := func() error {
				got := make([]byte, len(want))
				_, err := disk.ReadAt(got, 0)
				if err == nil && !bytes.Equal(got, want) {
					t.Error("the disk has another content than the snapshot")
				}
				return err
			}
			if err := read(); err != nil {
				t.Error(err)
			}
			server.MoveDatastore("web01", "ds 2/a")
			server.MoveHost("web01", "esx2.test")
			server.NFC("esx1.test").Cut()
			if err := read(); err != nil {
				t.Errorf("after a migration: %v", err)
			}
			if n := server.NFC("esx2.test").Stats().Connections; n != 1 {
				t.Errorf("%d connections to the new host", n)
			}
			server.RemoveSnapshotBehindBack("web01", "a")
			server.NFC("esx2.test").Cut()
			if err := read(); !errors.Is(err, inventory.ErrSnapshotGone) {
				t.Errorf("without the snapshot: %v", err)
			}
		})
	}
}
