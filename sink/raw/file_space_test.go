package raw

import (
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/vddkcp/vddkcp/internal/peer"
	"github.com/vddkcp/vddkcp/sink"
)

func TestPreallocation(t *testing.T) {
	for p, allocated := range map[Preallocation]bool{"": false, PreallocateOff: false, PreallocateFalloc: true, PreallocateFull: true} {
		path := filepath.Join(t.TempDir(), "disk.raw")
		d, err := CreateFile(t.Context(), path, diskSize, Options{Preallocation: p})
		if err != nil {
			t.Fatal(err)
		}
		if err := errors.Join(d.ZeroAt(t.Context(), 0, diskSize), d.Finish(t.Context()), d.Publish(t.Context())); err != nil {
			t.Fatal(err)
		}
		var s unix.Stat_t
		unix.Stat(path, &s)
		if got := s.Blocks*512 >= diskSize; got != allocated || s.Size != diskSize {
			t.Errorf("preallocation %q: %d of %d bytes are allocated", p, s.Blocks*512, s.Size)
		}
	}
}

// mount mounts a tmpfs, and returns its place.
func mount(t *testing.T, options string) string {
	t.Helper()
	peer.NeedRoot(t)
	dir := t.TempDir()
	peer.Run(t, "mount", "-t", "tmpfs", "-o", options, "none", dir)
	t.Cleanup(func() { peer.Run(t, "umount", dir) })
	return dir
}

func TestNoSpaceInMidCopy(t *testing.T) {
	dir := mount(t, "size=512k")
	err := copyTo(t, filepath.Join(dir, "disk.raw"), Options{}, kernel())
	if !errors.Is(err, unix.ENOSPC) || !strings.Contains(err.Error(), "at offset") || !strings.Contains(err.Error(), "(0 B free)") {
		t.Errorf("error %v", err)
	}
	inFolder(t, dir)
	for _, p := range []Preallocation{PreallocateFalloc, PreallocateFull} { // these know beforehand
		if err := CheckFile(filepath.Join(dir, "disk.raw"), diskSize, Options{Preallocation: p}); !errors.Is(err, unix.ENOSPC) {
			t.Errorf("preallocation %s: %v", p, err)
		}
	}
}

// The space of a .partial that is dropped counts as free.
func TestSpaceOfDroppedPartial(t *testing.T) {
	dir := mount(t, "size=2m")
	path := filepath.Join(dir, "disk.raw")
	put(t, path+".partial", strings.Repeat("x", 1536<<10))
	if err := copyTo(t, path, Options{Force: true, Need: diskSize}, kernel()); err != nil {
		t.Error(err)
	}
}

// TestSpaceOfResumedPartial checks that space which an earlier run has allocated
// need not be free again.
func TestSpaceOfResumedPartial(t *testing.T) {
	dir := mount(t, "size=2m")
	path := filepath.Join(dir, "disk.raw")
	put(t, path+".partial", strings.Repeat("x", 1536<<10))
	for _, o := range []Options{{Need: 2 << 20}, {Preallocation: PreallocateFalloc}} {
		o.Options = sink.Options{State: state(2 << 20), Resume: 1 << 20}
		if err := CheckFile(path, 2<<20, o); err != nil {
			t.Error(err)
		}
		if err := CheckFile(path, 3<<20, Options{Options: sink.Options{State: state(3 << 20), Resume: 1 << 20}, Need: 3 << 20}); !errors.Is(err, unix.ENOSPC) {
			t.Errorf("3 MiB where 2 are free and used: %v", err)
		}
	}
}

func TestReadOnlyFileSystem(t *testing.T) {
	dir := mount(t, "size=4m")
	peer.Run(t, "mount", "-o", "remount,ro", dir)
	path := filepath.Join(dir, "disk.raw")
	_, err := CreateFile(t.Context(), path, diskSize, Options{})
	for _, err := range []error{err, CheckFile(path, diskSize, Options{})} {
		if !errors.Is(err, unix.EROFS) || !strings.Contains(err.Error(), path) {
			t.Errorf("error %v", err)
		}
	}
}

func TestFileSizeLimit(t *testing.T) {
	if path := os.Getenv("VDDKCP_TEST_LIMIT"); path != "" {
		if err := unix.Setrlimit(unix.RLIMIT_FSIZE, &unix.Rlimit{Cur: 4096, Max: 4096}); err != nil {
			t.Fatal(err)
		}
		if err := copyTo(t, path, Options{}, kernel()); !errors.Is(err, unix.EFBIG) || !strings.Contains(err.Error(), "ulimit -f") {
			t.Fatalf("error %v", err)
		}
		return
	}
	dir := t.TempDir()
	again := exec.Command(os.Args[0], "-test.run=^TestFileSizeLimit$")
	again.Env = append(os.Environ(), "VDDKCP_TEST_LIMIT="+filepath.Join(dir, "disk.raw"))
	if out, err := again.CombinedOutput(); err != nil {
		t.Errorf("%v\n%s", err, out)
	}
	inFolder(t, dir)
}
