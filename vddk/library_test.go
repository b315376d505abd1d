package vddk_test

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/vddkcp/vddkcp/internal/peer"
	"github.com/vddkcp/vddkcp/vddk"
)

// buildLibrary compiles a library at path that exports the functions. args are arguments for the
// linker.
func buildLibrary(t *testing.T, path string, functions []string, args ...string) {
	t.Helper()
	peer.Need(t, "gcc")
	if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
		t.Fatal(err)
	}
	var code strings.Builder
	for _, f := range functions {
		fmt.Fprintf(&code, "void %s(void) {}\n", f)
	}
	source := filepath.Join(t.TempDir(), "lib.c")
	write(t, source, code.String())
	peer.Run(t, "gcc", slices.Concat([]string{"-shared", "-nostdlib", "-fPIC", "-o", path, source}, args)...)
}

func write(t *testing.T, path, text string) {
	t.Helper()
	if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(path, []byte(text), 0o644); err != nil {
		t.Fatal(err)
	}
}

func TestFindLibrary(t *testing.T) {
	real := filepath.Join(t.TempDir(), "lib.so")
	buildLibrary(t, real, nil)
	image, err := os.ReadFile(real)
	if err != nil {
		t.Fatal(err)
	}
	arm := slices.Clone(image)
	arm[18] = 183 // e_machine: EM_AARCH64
	small := slices.Clone(image)
	small[4] = 1 // EI_CLASS: 32 bits
	for name, c := range map[string]struct {
		files  []string // paths in the root; PATH=TEXT is a file with that text, PATH>TARGET a symbolic link
		libdir string   // path in the root
		want   string   // path of the library in the root, its Root in the root, its version
		fails  string
	}{
		"the distribution":      {files: []string{"lib64/libvixDiskLib.so.8"}, want: "lib64/libvixDiskLib.so.8 . 8"},
		"its lib64":             {files: []string{"lib64/libvixDiskLib.so.8"}, libdir: "lib64", want: "lib64/libvixDiskLib.so.8 . 8"},
		"the library itself":    {files: []string{"lib64/libvixDiskLib.so.7"}, libdir: "lib64/libvixDiskLib.so.7", want: "lib64/libvixDiskLib.so.7 . 7"},
		"no lib64":              {files: []string{"libvixDiskLib.so.6"}, want: "libvixDiskLib.so.6 . 6"},
		"the newest":            {files: []string{"lib64/libvixDiskLib.so.7", "lib64/libvixDiskLib.so.9", "lib64/libvixDiskLib.so.8"}, want: "lib64/libvixDiskLib.so.9 . 9"},
		"lib64 before the root": {files: []string{"lib64/libvixDiskLib.so.6", "libvixDiskLib.so.8"}, want: "lib64/libvixDiskLib.so.6 . 6"},
		"5 last":                {files: []string{"lib64/libvixDiskLib.so.5", "libvixDiskLib.so.6"}, want: "libvixDiskLib.so.6 . 6"},
		"5 alone":               {files: []string{"lib64/libvixDiskLib.so.5"}, want: "lib64/libvixDiskLib.so.5 . 5"},
		"a link to its version": {files: []string{"lib64/libvixDiskLib.so.8.0.3", "lib64/libvixDiskLib.so.8>libvixDiskLib.so.8.0.3"}, want: "lib64/libvixDiskLib.so.8.0.3 . 8"},
		"a link without number": {files: []string{"lib64/libvixDiskLib.so.8.0.3", "lib64/libvixDiskLib.so>libvixDiskLib.so.8.0.3"}, libdir: "lib64/libvixDiskLib.so", want: "lib64/libvixDiskLib.so.8.0.3 . 8"},
		"lib64 is a link":       {files: []string{"files/libvixDiskLib.so.8", "lib64>files"}, want: "files/libvixDiskLib.so.8 . 8"},
		"a link into it":        {files: []string{"v/lib64/libvixDiskLib.so.8", "libvixDiskLib.so.8>v/lib64/libvixDiskLib.so.8"}, libdir: "libvixDiskLib.so.8", want: "v/lib64/libvixDiskLib.so.8 v 8"},
		"a newer one by name":   {files: []string{"libvixDiskLib.so.10"}, libdir: "libvixDiskLib.so.10", want: "libvixDiskLib.so.10 . 10"},
		"what is unusable is passed over": {
			files: []string{"lib64/libvixDiskLib.so.9>nowhere", "lib64/libvixDiskLib.so.8=text", "libvixDiskLib.so.7"}, want: "libvixDiskLib.so.7 . 7"},
		"spaces": {files: []string{"my vddk/lib64/libvixDiskLib.so.8"}, libdir: "my vddk", want: "my vddk/lib64/libvixDiskLib.so.8 my vddk 8"},

		"nothing":               {files: []string{"lib64/README="}, fails: "no VDDK library found; looked for libvixDiskLib.so.5 to .9 in ROOT/lib64, ROOT"},
		"no such folder":        {libdir: "none", fails: "none: no such file or directory"},
		"a link for the folder": {files: []string{"vddk>away"}, libdir: "vddk", fails: "ROOT/vddk is a symbolic link to away, which does not exist"},
		"without its link":      {files: []string{"lib64/libvixDiskLib.so.8.0.3"}, fails: "ROOT/lib64/libvixDiskLib.so.8.0.3: the symbolic link libvixDiskLib.so.8 to it is missing"},
		"without a version":     {files: []string{"libvixDiskLib.so"}, fails: "ROOT/libvixDiskLib.so: its name has no version"},
		"too new":               {files: []string{"lib64/libvixDiskLib.so.10"}, fails: "ROOT/lib64/libvixDiskLib.so.10: it is version 10, only versions 5 to 9 are searched for"},
		"must be unpacked":      {files: []string{"VMware-vix-disklib-8.0.3-23950268.x86_64.tar.gz=x"}, fails: "x86_64.tar.gz: it is the archive of VDDK"},
		"a folder in a circle":  {files: []string{"lib64>lib64"}, fails: "ROOT/lib64: cannot be read: too many levels of symbolic links"},
		"a link to nowhere":     {files: []string{"lib64/libvixDiskLib.so.8>nowhere"}, fails: "ROOT/lib64/libvixDiskLib.so.8: no such file"},
		"text":                  {files: []string{"lib64/libvixDiskLib.so.8=hello"}, fails: "ROOT/lib64/libvixDiskLib.so.8: not an ELF file"},
		"an empty file":         {files: []string{"lib64/libvixDiskLib.so.8="}, fails: "lib64/libvixDiskLib.so.8: "},
		"another processor":     {files: []string{"lib64/libvixDiskLib.so.8=" + string(arm)}, fails: "EM_AARCH64"},
		"32 bits":               {files: []string{"lib64/libvixDiskLib.so.8=" + string(small)}, fails: "lib64/libvixDiskLib.so.8: "},
		"a truncated one":       {files: []string{"lib64/libvixDiskLib.so.8=" + string(image[:100])}, fails: "lib64/libvixDiskLib.so.8: "},
		"a folder":              {files: []string{"lib64/libvixDiskLib.so.8/x="}, fails: "not a regular file"},
		"another library":       {files: []string{"other.so"}, libdir: "other.so", fails: "neither the name of the file nor its SONAME is libvixDiskLib.so.N"},
		"older than can be":     {files: []string{"libvixDiskLib.so.4"}, libdir: "libvixDiskLib.so.4", fails: "the library has version 4, expected 5 or later"},
		"an absurd version":     {files: []string{"libvixDiskLib.so.99999999999999999999"}, libdir: "libvixDiskLib.so.99999999999999999999", fails: "expected 5 or later"},
		"below a plain file":    {files: []string{"file="}, libdir: "file/lib64", fails: "not a directory"},
	} {
		t.Run(name, func(t *testing.T) {
			root := filepath.Join(t.TempDir(), "ROOT")
			if err := os.Mkdir(root, 0o755); err != nil {
				t.Fatal(err)
			}
			for _, f := range c.files {
				if link, to, ok := strings.Cut(f, ">"); ok && len(f) < 100 {
					if err := os.MkdirAll(filepath.Dir(filepath.Join(root, link)), 0o755); err != nil {
						t.Fatal(err)
					}
					if err := os.Symlink(to, filepath.Join(root, link)); err != nil {
						t.Fatal(err)
					}
				} else if path, text, ok := strings.Cut(f, "="); ok {
					write(t, filepath.Join(root, path), text)
				} else {
					write(t, filepath.Join(root, f), string(image))
				}
			}
			l, err := vddk.FindLibrary(filepath.Join(root, c.libdir))
			if c.fails != "" {
				var failed *vddk.LibraryError
				if !errors.As(err, &failed) {
					t.Fatalf("%+v, %v; want a LibraryError", l, err)
				}
				if got := strings.ReplaceAll(err.Error(), root, "ROOT"); !strings.Contains(got, c.fails) {
					t.Errorf("%s\nwant %q", got, c.fails)
				}
				if !strings.Contains(failed.Hint(), "--libdir") {
					t.Errorf("hint %q", failed.Hint())
				}
				return
			}
			if err != nil {
				t.Fatal(err)
			}
			relative := func(path string) string {
				p, err := filepath.Rel(root, path)
				if err != nil {
					t.Fatal(err)
				}
				return p
			}
			if got := fmt.Sprintf("%s %s %d", relative(l.Path), relative(l.Root), l.Version); got != c.want {
				t.Errorf("got  %s\nwant %s", got, c.want)
			}
			if l.Dir != filepath.Dir(l.Path) {
				t.Errorf("Dir is %s, Path %s", l.Dir, l.Path)
			}
		})
	}
}

// The error for a folder that cannot be read says so.
func TestFolderThatCannotBeRead(t *testing.T) {
	root := t.TempDir()
	for _, dir := range []string{root, filepath.Dir(root)} {
		if err := os.Chmod(dir, 0o755); err != nil {
			t.Fatal(err)
		}
	}
	if err := os.Mkdir(filepath.Join(root, "lib64"), 0o700); err != nil {
		t.Fatal(err)
	}
	if os.Getuid() == 0 {
		runtime.LockOSThread()
		defer runtime.UnlockOSThread()
		if err := unix.Setfsuid(65534); err != nil {
			t.Fatal(err)
		}
		defer unix.Setfsuid(0)
	} else if err := os.Chmod(filepath.Join(root, "lib64"), 0); err != nil {
		t.Fatal(err)
	}
	if _, err := os.ReadDir(filepath.Join(root, "lib64")); !errors.Is(err, os.ErrPermission) {
		t.Skipf("the folder can be read: %v", err)
	}
	_, err := vddk.FindLibrary(root)
	if err == nil || !strings.Contains(err.Error(), root+"/lib64: cannot be read: permission denied") {
		t.Error(err)
	}
}

func TestSONAMEIsTheVersion(t *testing.T) {
	path := filepath.Join(t.TempDir(), "libvixDiskLib.so.9")
	buildLibrary(t, path, nil, "-Wl,-soname,libvixDiskLib.so.7")
	l, err := vddk.FindLibrary(path)
	if err != nil {
		t.Fatal(err)
	}
	if l.Version != 7 {
		t.Errorf("version %d, want 7: a library refuses what is above its own", l.Version)
	}
}

// Without a folder, the folders that docs/cli.md names are searched in order.
func TestDefaultPlaces(t *testing.T) {
	l, err := vddk.FindLibrary("")
	if err == nil {
		t.Skipf("this machine has %s", l.Path)
	}
	at := -1
	for _, place := range []string{"/usr/lib/vmware-vix-disklib/lib64, ", "/usr/lib64/vmware-vix-disklib/lib64, ", "/opt/vmware-vix-disklib-distrib/lib64, ", "/opt/openvddk/lib64, "} {
		i := strings.Index(err.Error(), place)
		if i <= at {
			t.Errorf("%v: %s is not in its place", err, place)
		}
		at = i
	}
}

func TestMissingLibrariesAreNamed(t *testing.T) {
	root := t.TempDir()
	lib := func(name string) string { return filepath.Join(root, "lib64", name) }
	empty := t.TempDir() // the libraries are not in this folder at run time
	buildLibrary(t, filepath.Join(empty, "libssl.so.3"), nil, "-Wl,-soname,libssl.so.3x-none")
	buildLibrary(t, filepath.Join(empty, "libgone.so.1"), nil, "-Wl,-soname,libgone.so.1")
	buildLibrary(t, lib("libown.so.2"), nil, "-Wl,-soname,libown.so.2", "-Wl,--no-as-needed", filepath.Join(empty, "libgone.so.1"))
	buildLibrary(t, lib("libvixDiskLib.so.8"), nil, "-Wl,--no-as-needed", lib("libown.so.2"), filepath.Join(empty, "libssl.so.3"), "-lc")
	l, err := vddk.FindLibrary(root)
	if err != nil {
		t.Fatal(err)
	}
	got := vddk.Missing(l)
	if want := []string{"libgone.so.1", "libssl.so.3x-none"}; !slices.Equal(got, want) {
		t.Errorf("%q, want %q: what lies beside the library and what the system has are no loss, and what others need is one", got, want)
	}
	for names, want := range map[string]string{"libssl.so.3": "VDDK 8.0.1", "libfoo.so.1": "symbolic links"} {
		e := &vddk.MissingError{Library: "l", Names: []string{names}}
		if !strings.Contains(e.Hint(), want) || !strings.Contains(e.Error(), names) {
			t.Errorf("%s: %v, hint %q, want %q", names, e, e.Hint(), want)
		}
	}
}

func TestMissingLooksWhereTheLibrarySays(t *testing.T) {
	root := t.TempDir()
	buildLibrary(t, filepath.Join(root, "more", "libmore.so.1"), nil, "-Wl,-soname,libmore.so.1")
	buildLibrary(t, filepath.Join(root, "libvixDiskLib.so.8"), nil, "-Wl,--no-as-needed", "-Wl,-rpath,$ORIGIN/more", filepath.Join(root, "more", "libmore.so.1"))
	l, err := vddk.FindLibrary(root)
	if err != nil {
		t.Fatal(err)
	}
	if got := vddk.Missing(l); len(got) > 0 {
		t.Errorf("%q", got)
	}
}

func TestFunctions(t *testing.T) {
	root := t.TempDir()
	buildLibrary(t, filepath.Join(root, "libvixDiskLib.so.8"), []string{"VixDiskLib_InitEx", "VixDiskLib_Open", "VixDiskLib_Other"})
	l, err := vddk.FindLibrary(root)
	if err != nil {
		t.Fatal(err)
	}
	list, err := vddk.Functions(l)
	if err != nil {
		t.Fatal(err)
	}
	present := 0
	for _, f := range list {
		if f.Present {
			present++
			if f.Name != "VixDiskLib_InitEx" && f.Name != "VixDiskLib_Open" {
				t.Errorf("%s is there", f.Name)
			}
		}
	}
	if present != 2 || len(list) < 25 {
		t.Errorf("%d of %d functions are there, want 2 of 25 or more", present, len(list))
	}
}
