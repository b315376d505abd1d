package vmdk_test

import (
	"context"
	"crypto/sha256"
	"fmt"
	"io"
	"path/filepath"
	"strings"
	"testing"

	"github.com/vddkcp/vddkcp/internal/peer"
	"github.com/vddkcp/vddkcp/source"
	sourceopen "github.com/vddkcp/vddkcp/source/open"
	"github.com/vddkcp/vddkcp/source/raw"
	"github.com/vddkcp/vddkcp/source/vmdk"
)

// opener opens the files that an image names, relative to its folder. It does not
// detect loops.
func opener(ctx context.Context, from, name, format string) (source.Disk, error) {
	if !filepath.IsAbs(name) {
		name = filepath.Join(filepath.Dir(from), name)
	}
	f, err := raw.Open(ctx, name)
	if err != nil || format == "raw" {
		return f, err
	}
	return vmdk.Open(ctx, name, f, opener, vmdk.Options{})
}

// open opens an image that is closed with the test.
func open(t testing.TB, path string) (*vmdk.Disk, error) {
	t.Helper()
	f, err := raw.Open(t.Context(), path)
	if err != nil {
		t.Fatal(err)
	}
	d, err := vmdk.Open(t.Context(), path, f, opener, vmdk.Options{})
	if err == nil {
		t.Cleanup(func() { d.Close() })
	}
	return d, err
}

func mustOpen(t testing.TB, path string) *vmdk.Disk {
	t.Helper()
	d, err := open(t, path)
	if err != nil {
		t.Fatal(err)
	}
	return d
}

// openChain opens an image as vddkcp does, so that loops of images are detected.
func openChain(t testing.TB, path string) (source.Disk, error) {
	t.Helper()
	d, err := new(sourceopen.Opener).Open(t.Context(), path, "vmdk")
	if err == nil {
		t.Cleanup(func() { d.Close() })
	}
	return d, err
}

// content reads the whole disk.
func content(t testing.TB, d source.Disk) []byte {
	t.Helper()
	all, err := io.ReadAll(io.NewSectionReader(d, 0, d.Size()))
	if err != nil {
		t.Fatal(err)
	}
	return all
}

const samples = "../../../shared/samples"

func TestSamples(t *testing.T) {
	for _, c := range []struct {
		file   string
		size   int64
		sha256 string // or
		err    string // what the error must have
	}{
		{"streamOptimizedWithMarkers.vmdk", 1048576, "92c0f8b4280377437056f57c51ef51a5f8aeb1462ac630ef0633febcbfc3db4e", ""},
		{"twoGbMaxExtentSparse.vmdk", 10485760, "a3bcf05f07a1c06a3380eeca8571f0efb2b85afafa1e21662b8cad436d1f7727", ""},
		{"vmfs_thick.vmdk", 2097152, "8d43c795d24bce01b49f92744f934c1072210dcac170bb1c83a5aa56df46ab7d", ""},
		{"plaso_image.vmdk", 102400, "854c3db1c4a07a241e2ed9fbd8892adf2adc662c7862a75deed26f3483f414c9", ""},
		{"dfvfs_ext2.vmdk", 4194304, "a6c2f0e39afe6c6ab432ca5465349fcefe8dc944398e97b2d957d3f89dbb5d80", ""},
		{"vmfs_thick-000001.vmdk", 0, "", `descriptor line 9: extent "vmfs_thick-000001-delta.vmdk": open ` + samples + "/vmfs_thick-000001-delta.vmdk: no such file"},
		{"win-missing-extents.vmdk", 0, "", `extent "disk-s001.vmdk": open ` + samples + "/disk-s001.vmdk: no such file"},
		{"invalid.vmdk", 0, "", "overHead) ends at sector 128, but the file has 65187 bytes"},
		{"twoGbMaxExtentSparse-s001.vmdk", 0, "", "without a descriptor"},
	} {
		t.Run(c.file, func(t *testing.T) {
			path := filepath.Join(samples, c.file)
			peer.NeedFile(t, path)
			d, err := open(t, path)
			if c.err != "" {
				if err == nil || !strings.Contains(err.Error(), c.err) || !strings.Contains(err.Error(), path) {
					t.Fatalf("error %v, want %q in it", err, c.err)
				}
				return
			}
			if err != nil {
				t.Fatal(err)
			}
			if got := fmt.Sprintf("%x", sha256.Sum256(content(t, d))); d.Size() != c.size || got != c.sha256 {
				t.Errorf("%d bytes, SHA-256 %s, want %d, %s", d.Size(), got, c.size, c.sha256)
			}
		})
	}
}
