package client_test

import (
	"bytes"
	"errors"
	"os"
	"testing"

	"github.com/vddkcp/vddkcp/nbd"
	"github.com/vddkcp/vddkcp/nbd/client"
	"github.com/vddkcp/vddkcp/source"
	"github.com/vddkcp/vddkcp/source/sourcetest"
)

func TestWritable(t *testing.T) {
	for _, c := range []struct {
		name string
		args []string // arguments before the plugin and its file
		more []string // arguments after them
	}{
		{"file", nil, nil},
		{"no structured replies", []string{"--no-sr"}, nil},
		{"no zeroing", []string{"--filter=nozero"}, nil},
		{"one connection", []string{"--filter=multi-conn"}, []string{"multi-conn-mode=disable"}},
		{"blocks of 4 KiB", []string{"--filter=blocksize-policy"}, []string{"blocksize-minimum=4096", "blocksize-preferred=4096", "blocksize-maximum=64K", "blocksize-error-policy=error"}},
		{"nothing that is not needed", []string{"--no-sr", "--filter=nozero", "--filter=noextents", "--filter=nocache"}, nil},
	} {
		t.Run(c.name, func(t *testing.T) {
			want := content(2<<20 + 8192)
			path := sparse(t, want)
			uri := serve(t, append(append(c.args, "file", path), c.more...)...)
			d, err := client.OpenWritable(t.Context(), parseURI(t, uri), client.Options{})
			if err != nil {
				t.Fatal(err)
			}
			sourcetest.Writable(t, d, want)
			if err := d.Close(); err != nil {
				t.Fatal(err)
			}
			if got, err := os.ReadFile(path); err != nil || !bytes.Equal(got, want) {
				t.Errorf("the file differs from what was read of it, %v", err)
			}
			if _, err := d.WriteAt([]byte{1}, 0); !errors.Is(err, os.ErrClosed) {
				t.Errorf("write after Close: %v", err)
			}
		})
	}
}

func TestWritableErrors(t *testing.T) {
	if _, err := client.OpenWritable(t.Context(), parseURI(t, serve(t, "-r", "memory", "1M")), client.Options{}); !errors.Is(err, client.ErrReadOnly) {
		t.Errorf("a read-only export: %v", err)
	}
	d, err := client.OpenWritable(t.Context(), parseURI(t, serve(t, "--filter=error", "memory", "1M", "error=ENOSPC", "error-pwrite-rate=100%", "error-trim-rate=100%")), client.Options{})
	if err != nil {
		t.Fatal(err)
	}
	defer d.Close()
	// The caller must get the error of the server at once, with its error number.
	if _, err := d.WriteAt(make([]byte, 512), 0); !errors.Is(err, nbd.ENOSPC) || !source.IsPermanent(err) {
		t.Errorf("write: %v, permanent: %v", err, source.IsPermanent(err))
	}
	if err := d.Trim(t.Context(), 0, 512); !errors.Is(err, nbd.ENOSPC) {
		t.Errorf("trim: %v", err)
	}
	if err := d.Flush(t.Context()); err != nil {
		t.Errorf("flush: %v", err)
	}
}
