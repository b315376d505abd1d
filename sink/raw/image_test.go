package raw

import (
	"bytes"
	"errors"
	"io"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/vddkcp/vddkcp/sink"
)

// An image grows, is suspended, loses what came after the checkpoint, and ends
// with the size that it turns out to have.
func TestImage(t *testing.T) {
	path := filepath.Join(t.TempDir(), "disk.qcow2")
	checkImage(t, path, 0)
	inFolder(t, filepath.Dir(path), "disk.qcow2")
	hasContent(t, path, append(bytes.Repeat([]byte{1}, 5000), 0, 0, 2))
}

func TestImageOnDevice(t *testing.T) {
	path := loop(t, 1<<20)
	checkImage(t, path, 0xAA)
	got, err := os.ReadFile(path)
	want := bytes.Repeat([]byte{0xAA}, 1<<20)
	copy(want, bytes.Repeat([]byte{1}, 5000))
	copy(want[5000:], bytes.Repeat([]byte{0xBB}, 5000)) // stale, and stays: a device can't be cut
	want[5002] = 2
	if err != nil || !bytes.Equal(got, want) {
		t.Errorf("%v, %x", err, got[4990:5010])
	}
	d, err := CreateImage(t.Context(), path, Options{})
	if err != nil {
		t.Fatal(err)
	}
	defer d.Abort()
	if _, err := d.WriteAt([]byte{1, 2}, 1<<20-1); err == nil || !strings.Contains(err.Error(), "too small") {
		t.Errorf("a write past the device: %v", err)
	}
}

func checkImage(t *testing.T, path string, fill byte) {
	t.Helper()
	if err := CheckImage(path, Options{}); err != nil {
		t.Fatal(err)
	}
	d, err := CreateImage(t.Context(), path, Options{})
	if err != nil {
		t.Fatal(err)
	}
	defer d.Abort()
	if _, err := d.WriteAt(bytes.Repeat([]byte{1}, 5000), 0); err != nil {
		t.Fatal(err)
	}
	state, sync, err := d.Checkpoint(5000)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := d.WriteAt(bytes.Repeat([]byte{0xBB}, 5000), 5000); err != nil {
		t.Fatal(err)
	}
	if err := errors.Join(sync(t.Context()), d.Suspend()); err != nil {
		t.Fatal(err)
	}

	d, err = CreateImage(t.Context(), path, Options{Options: sink.Options{State: state, Resume: 5000}})
	if err != nil {
		t.Fatal(err)
	}
	defer d.Abort()
	if _, err := d.WriteAt([]byte{2}, 5002); err != nil {
		t.Fatal(err)
	}
	got := make([]byte, 10)
	if _, err := d.ReadAt(got[:3], 4998); err != nil || got[0] != 1 || got[1] != 1 {
		t.Errorf("ReadAt: %x, %v", got, err)
	}
	if d.ZeroedFrom(5000) != (fill == 0) {
		t.Errorf("ZeroedFrom: %v", d.ZeroedFrom(5000))
	}
	if n, err := d.ReadAt(got, 5000); fill == 0 && (n != 3 || err != io.EOF) {
		t.Errorf("ReadAt past the end: %d, %v", n, err)
	}
	if err := d.Finish(t.Context()); err == nil || !strings.Contains(err.Error(), "size") {
		t.Errorf("Finish before SetSize: %v", err)
	}
	d.Abort()

	// The file stays, since this run did not make it.
	d, err = CreateImage(t.Context(), path, Options{Options: sink.Options{State: state, Resume: 5000}})
	if err != nil {
		t.Fatal(err)
	}
	defer d.Abort()
	if _, err := d.WriteAt([]byte{2}, 5002); err != nil {
		t.Fatal(err)
	}
	if err := errors.Join(d.SetSize(5003), d.Finish(t.Context())); err != nil {
		t.Fatal(err)
	}
	r, err := d.Reopen(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	if r.Size() != 5003 {
		t.Errorf("reopened: %d bytes, want 5003", r.Size())
	}
	if err := errors.Join(r.Close(), d.Publish(t.Context())); err != nil {
		t.Fatal(err)
	}
}

// TestImageResumesItsOwnOnly checks that an image which does not match the state is
// refused.
func TestImageResumesItsOwnOnly(t *testing.T) {
	path := filepath.Join(t.TempDir(), "disk.qcow2")
	put(t, path+".partial", "0123456789")
	for _, o := range []Options{
		{Options: sink.Options{State: state(10), Resume: 5}},
		{Options: sink.Options{State: state(sink.UnknownSize), Resume: 11}},
		{Options: sink.Options{Resume: 5}},
		{Preallocation: PreallocateFull},
	} {
		if d, err := CreateImage(t.Context(), path, o); err == nil {
			d.Abort()
			t.Errorf("%+v: no error", o)
		}
		hasContent(t, path+".partial", []byte("0123456789"))
	}
}
