package open_test

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/vddkcp/vddkcp/internal/peer"
	"github.com/vddkcp/vddkcp/source"
	"github.com/vddkcp/vddkcp/source/open"
)

// write creates files in dir. files has their contents by their paths. A content "->
// TARGET" creates a symbolic link.
func write(t *testing.T, dir string, files map[string]string) {
	t.Helper()
	for name, content := range files {
		path := filepath.Join(dir, name)
		if err := os.MkdirAll(filepath.Dir(path), 0o700); err != nil {
			t.Fatal(err)
		}
		target, isLink := strings.CutPrefix(content, "-> ")
		var err error
		if isLink {
			err = os.Symlink(strings.ReplaceAll(target, "$DIR", dir), path)
		} else {
			err = os.WriteFile(path, []byte(content), 0o600)
		}
		if err != nil {
			t.Fatal(err)
		}
	}
}

// flat is a descriptor of one extent of a sector in the file of that name.
func flat(name string) string {
	return fmt.Sprintf("# Disk DescriptorFile\nversion=1\nCID=00000001\nparentCID=ffffffff\ncreateType=\"monolithicFlat\"\nRW 1 FLAT %q 0\n", name)
}

// child is a descriptor of a disk of zeros that has a parent.
func child(cid int, parent string, parentCID int) string {
	return fmt.Sprintf("# Disk DescriptorFile\nversion=1\nCID=%08x\nparentCID=%08x\nparentFileNameHint=%q\ncreateType=\"custom\"\nRW 1 ZERO\n", cid, parentCID, parent)
}

// overlay returns a qcow2 image of one cluster of 512 bytes, whose content is that of
// the backing file.
func overlay(backing, format string) string {
	b := make([]byte, 512, 520)
	copy(b, "QFI\xfb\x00\x00\x00\x03")
	binary.BigEndian.PutUint64(b[8:], 144) // of the backing file's name
	binary.BigEndian.PutUint32(b[16:], uint32(len(backing)))
	b[23] = 9                               // cluster_bits
	binary.BigEndian.PutUint64(b[24:], 512) // size
	b[39] = 1                               // l1_size
	binary.BigEndian.PutUint64(b[40:], 512) // l1_table_offset
	b[103] = 104                            // header_length
	binary.BigEndian.PutUint32(b[104:], 0xe2792aca)
	binary.BigEndian.PutUint32(b[108:], uint32(len(format)))
	copy(b[112:], format)
	copy(b[144:], backing)
	return string(b[:520])
}

// base is a descriptor of a disk of zeros.
func base(cid int) string {
	return fmt.Sprintf("# Disk DescriptorFile\nversion=1\nCID=%08x\nparentCID=ffffffff\ncreateType=\"custom\"\nRW 1 ZERO\n", cid)
}

var sector = strings.Repeat("s", 512)

func read(t *testing.T, d source.Disk) string {
	t.Helper()
	b, err := io.ReadAll(io.NewSectionReader(d, 0, d.Size()))
	if err != nil {
		t.Fatal(err)
	}
	return string(b)
}

func TestAddresses(t *testing.T) {
	dir := t.TempDir()
	t.Chdir(dir)
	cowd := "COWD" + strings.Repeat("\x00", 508)
	seSparse := "\xbe\xba\xfe\xca\x00\x00\x00\x00" + strings.Repeat("\x00", 504)
	write(t, dir, map[string]string{
		"disk.raw": sector, "a=b": sector, "[x] y": sector, "[x].img": sector, "empty": "", "-": sector, "nbd": sector,
		"disk.vmdk": flat("disk.raw"), "named-otherwise.img": flat("disk.raw"),
		"link": "-> disk.vmdk", "folder/link": "-> ../disk.vmdk", "folder/x": "",
		"disk.qcow2": "QFI\xfb\x00\x00\x00\x03", "cowd": cowd, "sesparse": seSparse, "nearly": "\xbe\xba\xfe\xca\x00\x00\x00\x01" + sector,
		"a.ova": sector, "a.vmdk#1": sector, "over.qcow2": overlay("disk.raw", "raw"), "over": overlay("disk.vmdk", "vmdk"),
	})
	if err := unix.Mkfifo("fifo", 0o600); err != nil {
		t.Fatal(err)
	}
	const (
		notRead = "not supported by this version"
		aUsage  = "usage"
	)
	for _, c := range []struct {
		address, format string
		want            string // the format of the disk, or a part of the error
		content         string // "": sector
		fails           bool
	}{
		{address: "disk.raw", want: "raw"},
		{address: "disk.raw", format: "raw", want: "raw"},
		{address: "./a=b", want: "raw"},
		{address: dir + "/a=b", want: "raw"},
		{address: "./[x] y", want: "raw"},
		{address: "[x].img", want: "raw"},
		{address: "./-", want: "raw"},
		{address: "nbd", want: "raw"},
		{address: "a.vmdk#1", want: "raw"},
		{address: "disk.vmdk", want: "vmdk"},
		{address: "disk.vmdk", format: "vmdk", want: "vmdk"},
		{address: "disk.vmdk", format: "raw", want: "raw", content: flat("disk.raw")},
		{address: "named-otherwise.img", want: "vmdk"},
		{address: "link", want: "vmdk"},
		{address: "over.qcow2", want: "qcow2"},
		{address: "over.qcow2", format: "qcow2", want: "qcow2"},
		{address: "over", want: "qcow2"},
		{address: "folder/link", want: "vmdk"}, // its folder is the file's, not the link's
		{address: "a.ova", format: "raw", want: "raw"},
		{address: "disk.qcow2", format: "raw", want: "raw", content: "QFI\xfb\x00\x00\x00\x03"},
		{address: "nearly", want: "raw", content: "\xbe\xba\xfe\xca\x00\x00\x00\x01" + sector},

		{address: "disk.qcow2", fails: true, want: "the file is truncated"},
		{address: "disk.raw", format: "qcow2", fails: true, want: "no qcow2 image"},
		{address: "a=b", fails: true, want: aUsage},
		{address: "server=esxi", fails: true, want: aUsage},
		{address: "file=disk.raw", fails: true, want: aUsage},
		{address: "[x] y", fails: true, want: notRead},
		{address: "[ds 1] vm/vm.vmdk", fails: true, want: notRead},
		{address: "vddk:/vm.vmdk", fails: true, want: notRead},
		{address: "nbd+unix:///?socket=none", fails: true, want: "there is no socket"},
		{address: "nbds+unix:///x?socket=none", fails: true, want: "there is no socket"},
		{address: "nbd+unix:///?socket=none", format: "vmdk", fails: true, want: aUsage},
		{address: "nbd://host/x?unknown=1", fails: true, want: aUsage},
		{address: "nbd+unix:///x", fails: true, want: aUsage},
		{address: "nbd+vsock://2", fails: true, want: aUsage},
		{address: "a.ova", fails: true, want: "no tar archive"},
		{address: "none.OVF", fails: true, want: "no such file"},
		{address: "cowd", fails: true, want: "part of a disk"},
		{address: "sesparse", fails: true, want: "part of a disk"},

		{address: "", fails: true, want: aUsage},
		{address: "-", fails: true, want: aUsage},
		{address: "disk.raw", format: "vhdx", fails: true, want: aUsage},

		{address: "none", fails: true, want: "no such file"},
		{address: "folder", fails: true, want: "is a directory"},
		{address: "fifo", fails: true, want: "is a FIFO"},
		{address: "disk.raw", format: "vmdk", fails: true, want: "no VMDK image"},
		{address: "empty", format: "vmdk", fails: true, want: "the file is empty"},
	} {
		t.Run(c.address+" "+c.format, func(t *testing.T) {
			d, err := new(open.Opener).Open(t.Context(), c.address, c.format)
			if c.fails {
				if err == nil {
					d.Close()
					t.Fatal("no error")
				}
				var bad *open.UsageError
				switch c.want {
				case notRead:
					if !errors.Is(err, open.ErrNotRead) {
						t.Errorf("%v, want an ErrNotRead", err)
					}
				case aUsage:
					if !errors.As(err, &bad) {
						t.Errorf("%v, want a UsageError", err)
					}
				default:
					if !strings.Contains(err.Error(), c.want) || errors.Is(err, open.ErrNotRead) || errors.As(err, &bad) {
						t.Errorf("%v, want %q", err, c.want)
					}
				}
				if !strings.Contains(err.Error(), c.address) && c.want != aUsage {
					t.Errorf("%v, want %q to be named", err, c.address)
				}
				return
			}
			if err != nil {
				t.Fatal(err)
			}
			defer d.Close()
			described, _ := source.Ability[source.Described](d)
			if got := described.Info().Format; got != c.want {
				t.Errorf("format %q, want %q", got, c.want)
			}
			if c.content == "" {
				c.content = sector
			}
			if got := read(t, d); got != c.content {
				t.Errorf("%d bytes %.20q, want %.20q", len(got), got, c.content)
			}
		})
	}
}

// TestReferences tests references that try to leave the permitted folders, and similar
// ones that do not.
func TestReferences(t *testing.T) {
	for _, c := range []struct {
		name    string
		files   map[string]string
		address string   // "": images/x.vmdk
		allow   []string // in the directory
		leads   string   // outside: where to, in the directory or absolute; "": it opens
		is      error    // another error
	}{
		{name: "beside", files: map[string]string{"images/x.vmdk": flat("x.bin"), "images/x.bin": sector}},
		{name: "below", files: map[string]string{"images/x.vmdk": flat("a/b/x.bin"), "images/a/b/x.bin": sector}},
		{name: "there and back", files: map[string]string{"images/x.vmdk": flat("../images/x.bin"), "images/x.bin": sector}},
		{name: "absolute, inside", files: map[string]string{"images/x.vmdk": flat("$DIR/images/x.bin"), "images/x.bin": sector}},
		{name: "a name that begins with dots", files: map[string]string{"images/x.vmdk": flat("..x.bin"), "images/..x.bin": sector}},
		{name: "a link to a file below", files: map[string]string{"images/x.vmdk": flat("l"), "images/l": "-> a/x.bin", "images/a/x.bin": sector}},
		{name: "a link out and back in", files: map[string]string{"images/x.vmdk": flat("l"), "images/l": "-> ../other/l", "other/l": "-> ../images/x.bin", "images/x.bin": sector}},
		{
			name: "the image is a link: its folder is the file's", address: "links/l",
			files: map[string]string{"links/l": "-> ../images/x.vmdk", "images/x.vmdk": flat("x.bin"), "images/x.bin": sector},
		},
		{
			name: "the image's folder is a link", address: "links/x.vmdk",
			files: map[string]string{"links": "-> images", "images/x.vmdk": flat("x.bin"), "images/x.bin": sector},
		},
		{name: "..", files: map[string]string{"images/x.vmdk": flat("../x.bin"), "x.bin": sector}, leads: "x.bin"},
		{name: ".. further on", files: map[string]string{"images/x.vmdk": flat("a/../../x.bin"), "images/a/y": "", "x.bin": sector}, leads: "x.bin"},
		{name: "a folder whose name begins the same", files: map[string]string{"images/x.vmdk": flat("../images2/x.bin"), "images2/x.bin": sector}, leads: "images2/x.bin"},
		{name: "absolute", files: map[string]string{"images/x.vmdk": flat("$DIR/x.bin"), "x.bin": sector}, leads: "x.bin"},
		{name: "a file of the system", files: map[string]string{"images/x.vmdk": flat("/etc/passwd")}, leads: "/etc/passwd"},
		{name: "a device, which is not opened", files: map[string]string{"images/x.vmdk": flat("l"), "images/l": "-> /dev/null"}, leads: "/dev/null"},
		{name: "a link to a file", files: map[string]string{"images/x.vmdk": flat("l"), "images/l": "-> ../x.bin", "x.bin": sector}, leads: "x.bin"},
		{name: "an absolute link", files: map[string]string{"images/x.vmdk": flat("l"), "images/l": "-> $DIR/x.bin", "x.bin": sector}, leads: "x.bin"},
		{name: "a link to a folder", files: map[string]string{"images/x.vmdk": flat("l/x.bin"), "images/l": "-> ../other", "other/x.bin": sector}, leads: "other/x.bin"},
		{name: "a link to a link", files: map[string]string{"images/x.vmdk": flat("l"), "images/l": "-> m", "images/m": "-> ../x.bin", "x.bin": sector}, leads: "x.bin"},
		{
			name: "the image is a link: not the link's folder", address: "links/l",
			files: map[string]string{"links/l": "-> ../images/x.vmdk", "images/x.vmdk": flat("$DIR/links/x.bin"), "links/x.bin": sector},
			leads: "links/x.bin",
		},
		{name: "nothing there, outside", files: map[string]string{"images/x.vmdk": flat("../none")}, leads: "none"},
		{name: "nothing there, inside", files: map[string]string{"images/x.vmdk": flat("none")}, is: fs.ErrNotExist},
		{name: "a parent outside", files: map[string]string{"images/x.vmdk": child(2, "../p.vmdk", 1), "p.vmdk": base(1)}, leads: "p.vmdk"},
		{name: "a parent below", files: map[string]string{"images/x.vmdk": child(2, "a/p.vmdk", 1), "images/a/p.vmdk": base(1)}},
		{
			// The folder is that of the image which has the reference.
			name:  "a parent below that names a file above it",
			files: map[string]string{"images/x.vmdk": child(2, "a/p.vmdk", 1), "images/a/p.vmdk": flat("../x.bin"), "images/x.bin": sector},
			leads: "images/x.bin",
		},
		{name: "allowed", allow: []string{"."}, files: map[string]string{"images/x.vmdk": flat("../x.bin"), "x.bin": sector}},
		{name: "allowed, all", allow: []string{"/"}, files: map[string]string{"images/x.vmdk": flat("../x.bin"), "x.bin": sector}},
		{name: "allowed, the second", allow: []string{"links", "other"}, files: map[string]string{"images/x.vmdk": flat("../other/x.bin"), "other/x.bin": sector, "links/y": ""}},
		{name: "allowed, through a link", allow: []string{"links"}, files: map[string]string{"images/x.vmdk": flat("../other/x.bin"), "other/x.bin": sector, "links": "-> other"}},
		{name: "allowed, another", allow: []string{"other"}, files: map[string]string{"images/x.vmdk": flat("../x.bin"), "x.bin": sector, "other/y": ""}, leads: "x.bin"},
		{name: "allowed, one whose name begins the same", allow: []string{"other"}, files: map[string]string{"images/x.vmdk": flat("../other2/x.bin"), "other2/x.bin": sector, "other/y": ""}, leads: "other2/x.bin"},
		{name: "allowed, but a link leads on", allow: []string{"other"}, files: map[string]string{"images/x.vmdk": flat("../other/l"), "other/l": "-> ../x.bin", "x.bin": sector}, leads: "x.bin"},
	} {
		for _, format := range []string{"", "vmdk"} {
			t.Run(c.name+" "+format, func(t *testing.T) {
				dir, err := filepath.EvalSymlinks(t.TempDir())
				if err != nil {
					t.Fatal(err)
				}
				files := map[string]string{}
				for name, content := range c.files {
					if !strings.HasPrefix(content, "-> ") {
						content = strings.ReplaceAll(content, "$DIR", dir)
					}
					files[name] = content
				}
				// A symbolic link to a folder is created before the files in that
				// folder.
				for name, content := range files {
					if strings.HasPrefix(content, "-> ") {
						write(t, dir, map[string]string{name: content})
						delete(files, name)
					}
				}
				write(t, dir, files)
				o := &open.Opener{}
				for _, a := range c.allow {
					o.AllowPath = append(o.AllowPath, filepath.Join(dir, a))
				}
				address := filepath.Join(dir, "images/x.vmdk")
				if c.address != "" {
					address = filepath.Join(dir, c.address)
				}
				d, err := o.Open(t.Context(), address, format)
				var outside *open.OutsideError
				switch {
				case c.is != nil:
					if !errors.Is(err, c.is) || errors.As(err, &outside) {
						t.Errorf("%v, want %v", err, c.is)
					}
				case c.leads != "":
					leads := c.leads
					if !filepath.IsAbs(leads) {
						leads = filepath.Join(dir, leads)
					}
					if !errors.As(err, &outside) {
						t.Fatalf("%v, want an OutsideError", err)
					}
					if outside.Target != leads || !strings.Contains(outside.Hint(), "--allow-path "+filepath.Dir(leads)+" ") {
						t.Errorf("it leads to %s, want %s; hint: %s", outside.Target, leads, outside.Hint())
					}
					for _, part := range []string{outside.Name, leads, outside.Folder, outside.Image} {
						if part == "" || !strings.Contains(err.Error(), part) {
							t.Errorf("%v, want %q to be named", err, part)
						}
					}
					for _, f := range o.Files() {
						if f.Path == leads {
							t.Errorf("%s is listed as opened", leads)
						}
					}
				case err != nil:
					t.Error(err)
				}
				if d != nil {
					read(t, d)
					d.Close()
				}
			})
		}
	}
}

// TestReferenceSwapped tests that an image cannot read a file outside of its folder
// through a symbolic link whose target changes all the time.
func TestReferenceSwapped(t *testing.T) {
	dir := t.TempDir()
	secret := strings.Repeat("x", 512)
	write(t, dir, map[string]string{"secret": secret, "images/x.vmdk": flat("l"), "images/x.bin": sector, "images/l": "-> x.bin"})
	link := filepath.Join(dir, "images/l")
	stop, done := make(chan struct{}), make(chan struct{})
	go func() {
		defer close(done)
		for i := 0; ; i++ {
			select {
			case <-stop:
				return
			default:
			}
			os.Symlink([]string{"x.bin", "../secret"}[i%2], link+".new")
			os.Rename(link+".new", link)
		}
	}()
	opened, refused := 0, 0
	for i := 0; i < 100_000 && (opened < 100 || refused < 100); i++ {
		o := new(open.Opener)
		d, err := o.Open(t.Context(), filepath.Join(dir, "images/x.vmdk"), "")
		if err != nil {
			refused++
			continue
		}
		opened++
		if got := read(t, d); got != sector {
			t.Errorf("read %.20q", got)
		}
		d.Close()
	}
	close(stop)
	<-done
	if opened == 0 || refused == 0 {
		t.Errorf("opened %d times, refused %d times", opened, refused)
	}
}

func TestLoops(t *testing.T) {
	for _, c := range []struct {
		name  string
		files map[string]string
		link  [2]string // a hard link
		want  string
	}{
		{name: "of itself", files: map[string]string{"x.vmdk": child(1, "x.vmdk", 1)}, want: "chain of images loops"},
		{name: "of two", files: map[string]string{"x.vmdk": child(1, "y.vmdk", 2), "y.vmdk": child(2, "x.vmdk", 1)}, want: "chain of images loops"},
		{name: "by a link", files: map[string]string{"x.vmdk": child(1, "y.vmdk", 1), "y.vmdk": "-> x.vmdk"}, want: "chain of images loops"},
		{name: "by a hard link", files: map[string]string{"x.vmdk": child(1, "y.vmdk", 1)}, link: [2]string{"x.vmdk", "y.vmdk"}, want: "chain of images loops"},
	} {
		t.Run(c.name, func(t *testing.T) {
			dir := t.TempDir()
			write(t, dir, c.files)
			if c.link[0] != "" {
				if err := os.Link(filepath.Join(dir, c.link[0]), filepath.Join(dir, c.link[1])); err != nil {
					t.Fatal(err)
				}
			}
			d, err := new(open.Opener).Open(t.Context(), filepath.Join(dir, "x.vmdk"), "")
			if err == nil {
				d.Close()
			}
			if err == nil || !strings.Contains(err.Error(), c.want) {
				t.Errorf("%v, want %q", err, c.want)
			}
		})
	}
}

func TestLongChains(t *testing.T) {
	dir := t.TempDir()
	const longest = 256
	for i := range longest {
		write(t, dir, map[string]string{fmt.Sprintf("%d.vmdk", i+1): child(i+1, fmt.Sprintf("%d.vmdk", i), i)})
	}
	write(t, dir, map[string]string{"0.vmdk": base(0)})
	o := new(open.Opener)
	d, err := o.Open(t.Context(), filepath.Join(dir, fmt.Sprintf("%d.vmdk", longest-1)), "")
	if err != nil {
		t.Fatal(err)
	}
	d.Close()
	if n := len(o.Files()); n != longest {
		t.Errorf("%d files, want %d", n, longest)
	}
	d, err = o.Open(t.Context(), filepath.Join(dir, fmt.Sprintf("%d.vmdk", longest)), "")
	if err == nil {
		d.Close()
	}
	if err == nil || !strings.Contains(err.Error(), "256") {
		t.Errorf("%v, want an error of the length", err)
	}
}

// TestParentIsVMDK tests that a raw file is refused as the parent of a VMDK.
func TestParentIsVMDK(t *testing.T) {
	dir := t.TempDir()
	write(t, dir, map[string]string{"x.vmdk": child(1, "y.raw", 2), "y.raw": sector})
	d, err := new(open.Opener).Open(t.Context(), filepath.Join(dir, "x.vmdk"), "")
	if err == nil {
		d.Close()
	}
	if err == nil || !strings.Contains(err.Error(), "no VMDK image") || !strings.Contains(err.Error(), "y.raw") {
		t.Errorf("%v", err)
	}
}

func TestUses(t *testing.T) {
	dir := t.TempDir()
	write(t, dir, map[string]string{
		"x.vmdk": child(2, "p.vmdk", 1), "p.vmdk": flat("p.bin"), "p.bin": sector,
		"link": "-> p.bin", "other": sector,
	})
	path := func(name string) string { return filepath.Join(dir, name) }
	if err := os.Link(path("p.bin"), path("hard")); err != nil {
		t.Fatal(err)
	}
	o := new(open.Opener)
	for range 2 { // opening again lists nothing twice
		d, err := o.Open(t.Context(), path("x.vmdk"), "")
		if err != nil {
			t.Fatal(err)
		}
		d.Close()
	}
	if files := o.Files(); len(files) != 3 {
		t.Errorf("%d files: %v", len(files), files)
	}
	for name, want := range map[string]string{"x.vmdk": "x.vmdk", "p.vmdk": "p.vmdk", "p.bin": "p.bin", "link": "p.bin", "hard": "p.bin", "other": ""} {
		fi, err := os.Stat(path(name))
		if err != nil {
			t.Fatal(err)
		}
		got, ok := o.Uses(fi)
		if ok != (want != "") || ok && filepath.Base(got) != want {
			t.Errorf("Uses(%s): %q, %v, want %q", name, got, ok, want)
		}
	}
}

func TestUsesDevice(t *testing.T) {
	peer.NeedRoot(t)
	peer.Need(t, "losetup")
	dir := t.TempDir()
	write(t, dir, map[string]string{"disk": sector})
	device := strings.TrimSpace(peer.Run(t, "losetup", "--find", "--show", "--read-only", filepath.Join(dir, "disk")))
	t.Cleanup(func() { peer.Run(t, "losetup", "--detach", device) })
	o := new(open.Opener)
	d, err := o.Open(t.Context(), device, "")
	if err != nil {
		t.Fatal(err)
	}
	defer d.Close()
	var st unix.Stat_t
	if err := unix.Stat(device, &st); err != nil {
		t.Fatal(err)
	}
	node := filepath.Join(dir, "node")
	if err := unix.Mknod(node, unix.S_IFBLK|0o600, int(st.Rdev)); err != nil {
		t.Fatal(err)
	}
	fi, err := os.Stat(node)
	if err != nil {
		t.Fatal(err)
	}
	if path, ok := o.Uses(fi); !ok || path != device {
		t.Errorf("another device file of the same device: %q, %v", path, ok)
	}
}

func TestAllowPathIsChecked(t *testing.T) {
	dir := t.TempDir()
	write(t, dir, map[string]string{"disk": sector})
	for _, allow := range []string{filepath.Join(dir, "none"), filepath.Join(dir, "disk"), ""} {
		o := &open.Opener{AllowPath: []string{allow}}
		_, err := o.Open(t.Context(), filepath.Join(dir, "disk"), "")
		var bad *open.UsageError
		if !errors.As(err, &bad) || !strings.Contains(err.Error(), "--allow-path") {
			t.Errorf("AllowPath %q: %v", allow, err)
		}
	}
}

// TestNothingIsLeftOpen tests that all files of a disk that cannot be opened are
// closed.
func TestNothingIsLeftOpen(t *testing.T) {
	dir := t.TempDir()
	write(t, dir, map[string]string{
		"a.vmdk": child(3, "b.vmdk", 2), "b.vmdk": child(2, "c.vmdk", 9), "c.vmdk": flat("c.bin"), "c.bin": sector,
		"outside/x.vmdk": flat("../c.bin"), "loop.vmdk": child(1, "loop.vmdk", 1), "q.qcow2": "QFI\xfb",
		"over.qcow2": overlay("up.qcow2", "qcow2"), "up.qcow2": overlay("../x", "raw"), "round.qcow2": overlay("back.qcow2", "qcow2"), "back.qcow2": overlay("round.qcow2", "qcow2"),
	})
	for _, name := range []string{"a.vmdk", "outside/x.vmdk", "loop.vmdk", "q.qcow2", "over.qcow2", "round.qcow2"} {
		d, err := new(open.Opener).Open(t.Context(), filepath.Join(dir, name), "")
		if err == nil {
			d.Close()
			t.Errorf("%s: no error", name)
		}
	}
	fds, err := os.ReadDir("/proc/self/fd")
	if err != nil {
		t.Skip(err)
	}
	for _, fd := range fds {
		if target, err := os.Readlink("/proc/self/fd/" + fd.Name()); err == nil && bytes.HasPrefix([]byte(target), []byte(dir)) {
			t.Errorf("%s is open", target)
		}
	}
}
