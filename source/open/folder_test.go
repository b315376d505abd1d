package open_test

import (
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	"github.com/vddkcp/vddkcp/source/open"
)

// differencing is the descriptor of an image of VirtualBox that has one sector
// of zeros.
func differencing(uuid, parent string) string {
	return fmt.Sprintf("# Disk DescriptorFile\nCID=1\nparentCID=ffffffff\nRW 1 ZERO\nddb.uuid.image=\"%s\"\nddb.uuid.parent=\"%s\"\n", uuid, parent)
}

// TestParentByUUID tests that a parent which is named only by its UUID is found in the
// folder of the image and in those of --allow-path, but not elsewhere.
func TestParentByUUID(t *testing.T) {
	for _, c := range []struct {
		name  string
		files map[string]string
		allow []string
		want  []string // of the error; nil: none
	}{
		{name: "beside", files: map[string]string{"vm/p.vmdk": differencing("a", "")}},
		{name: "beside, in capitals", files: map[string]string{"vm/P.VMDK": differencing("A", "")}},
		{name: "of another extension", files: map[string]string{"vm/p.img": differencing("a", "")}, want: []string{`the UUID "a"`, "none of 1 files named *.vmdk"}},
		{name: "above", files: map[string]string{"p.vmdk": differencing("a", "")}, want: []string{"none of 1 files"}},
		{name: "above, allowed", files: map[string]string{"p.vmdk": differencing("a", "")}, allow: []string{"."}},
		{name: "below", files: map[string]string{"vm/sub/p.vmdk": differencing("a", "")}, want: []string{"none of 1 files"}},
		{name: "by a link inside", files: map[string]string{"vm/sub/p": differencing("a", ""), "vm/p.vmdk": "-> sub/p"}},
		{name: "by a link outside", files: map[string]string{"p": differencing("a", ""), "vm/p.vmdk": "-> ../p"}, want: []string{"1 of them could not be read", "outside of the image's folder"}},
		{name: "by a link outside, allowed", files: map[string]string{"p": differencing("a", ""), "vm/p.vmdk": "-> ../p"}, allow: []string{"."}},
		{name: "by a link to nothing", files: map[string]string{"vm/p.vmdk": "-> none"}, want: []string{"1 of them could not be read", "no such file"}},
		{name: "with a folder of such a name", files: map[string]string{"vm/q.vmdk/x": "", "vm/p.vmdk": differencing("a", "")}},
		{name: "a chain", files: map[string]string{"vm/p.vmdk": differencing("a", "c"), "vm/q.vmdk": differencing("c", "")}},
		{name: "a chain that ends", files: map[string]string{"vm/p.vmdk": differencing("a", "c")}, want: []string{`p.vmdk: cannot find the parent, the image with the UUID "c"`}},
		{name: "two", files: map[string]string{"vm/p.vmdk": differencing("a", ""), "vm/q.vmdk": differencing("a", "")}, want: []string{"two files have this UUID"}},
		{name: "two, in two folders", files: map[string]string{"vm/p.vmdk": differencing("a", ""), "q.vmdk": differencing("a", "")}, allow: []string{"."}, want: []string{"two files have this UUID"}},
	} {
		t.Run(c.name, func(t *testing.T) {
			dir := t.TempDir()
			if err := os.Mkdir(filepath.Join(dir, "vm"), 0o777); err != nil {
				t.Fatal(err)
			}
			write(t, dir, c.files)
			write(t, dir, map[string]string{"vm/child.vmdk": differencing("b", "a")})
			if err := syscall.Mkfifo(filepath.Join(dir, "vm/fifo.vmdk"), 0o600); err != nil {
				t.Fatal(err)
			}
			o := new(open.Opener)
			for _, a := range c.allow {
				o.AllowPath = append(o.AllowPath, filepath.Join(dir, a))
			}
			d, err := o.Open(t.Context(), filepath.Join(dir, "vm/child.vmdk"), "")
			if err == nil {
				d.Close()
			}
			if (err != nil) != (c.want != nil) {
				t.Fatalf("%v, want %q", err, c.want)
			}
			for _, w := range c.want {
				if !strings.Contains(err.Error(), w) {
					t.Errorf("%v, want %q", err, w)
				}
			}
			// With SingleLink the image opens without a parent.
			d, err = (&open.Opener{SingleLink: true}).Open(t.Context(), filepath.Join(dir, "vm/child.vmdk"), "")
			if err != nil {
				t.Fatalf("a single link: %v", err)
			}
			d.Close()
		})
	}
}

// TestParentSearchIsBounded tests that a folder with too many files is not searched.
func TestParentSearchIsBounded(t *testing.T) {
	dir := t.TempDir()
	files := map[string]string{"child.vmdk": differencing("b", "a"), "p.vmdk": differencing("a", "")}
	for i := range 4095 {
		files[fmt.Sprintf("x%d.vmdk", i)] = ""
	}
	write(t, dir, files)
	_, err := new(open.Opener).Open(t.Context(), filepath.Join(dir, "child.vmdk"), "")
	if err == nil || !strings.Contains(err.Error(), "4097 files are named *.vmdk, want at most 4096") {
		t.Error(err)
	}
	if err := os.Remove(filepath.Join(dir, "x7.vmdk")); err != nil {
		t.Fatal(err)
	}
	o := new(open.Opener)
	d, err := o.Open(t.Context(), filepath.Join(dir, "child.vmdk"), "")
	if err != nil {
		t.Fatal(err)
	}
	d.Close()
	// Files that were only inspected do not belong to the source.
	if files := o.Files(); len(files) != 2 {
		t.Errorf("%d files are listed, want 2", len(files))
	}
}
