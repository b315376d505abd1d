// Package packaging has the tests of the packages that "make dist" writes.
package packaging

import (
	"archive/tar"
	"bytes"
	"compress/gzip"
	"debug/buildinfo"
	"encoding/json"
	"errors"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"runtime"
	"slices"
	"strings"
	"testing"

	"github.com/vddkcp/vddkcp/internal/peer"
)

// The version that the packages in the tests have, as "git describe" and as package managers see
// it.
const (
	described = "v1.2.3-4-gabcdef0"
	version   = "1.2.3+4.gabcdef0"
	commit    = "abcdef0123456789abcdef0123456789abcdef01"
)

func TestVersion(t *testing.T) {
	for described, want := range map[string]string{
		"v1.0.0":             "1.0.0",
		"v1.0.0-rc.1":        "1.0.0~rc.1",
		"v1.0.0-12-gabcdef0": "1.0.0+12.gabcdef0",
		"v1.0.0-rc.1-3-gabc": "1.0.0~rc.1+3.gabc",
		"v1.0.0-dirty":       "1.0.0+dirty",
		"v1.0.0-2-gab-dirty": "1.0.0+2.gab.dirty",
		"f5be232":            "0.0.0+git20251201.f5be232",
		"f5be232-dirty":      "0.0.0+git20251201.f5be232.dirty",
		"devel":              "0.0.0+git20251201.devel",
	} {
		out, err := exec.Command("./version", described, "1764600000").CombinedOutput()
		if got := strings.TrimSpace(string(out)); err != nil || got != want {
			t.Errorf("version of %s: %q, %v, want %q", described, got, err, want)
		}
	}
	if out, err := exec.Command("./version", "", "1764600000").CombinedOutput(); err == nil {
		t.Errorf("an empty version: %s", out)
	}
}

// TestPackages builds all packages and installs them in new systems. While "make dist" compiles
// its tools, debootstrap makes such a system.
func TestPackages(t *testing.T) {
	if runtime.GOARCH != "amd64" {
		t.Skip("make dist needs amd64 or a cross compiler")
	}
	peer.NeedRoot(t)
	peer.Need(t, "git", "make", "gcc", "apt-get", "dpkg-deb", "rpm", "lintian", "debootstrap", "skopeo", "umoci", "qemu-img", "unshare", "chroot")
	system := startDebootstrap(t)
	dist := makeDist(t, "umask 022; make")
	t.Run("again", func(t *testing.T) {
		t.Parallel()
		// The second build has another folder, time, umask, time zone and language.
		same(t, dist, makeDist(t, "umask 077; TZ=Asia/Tokyo LC_ALL=C.UTF-8 make"))
	})
	t.Run("archive", func(t *testing.T) {
		t.Parallel()
		testArchive(t, dist)
	})
	t.Run("deb", func(t *testing.T) {
		t.Parallel()
		testDeb(t, filepath.Join(dist, "vddkcp_"+version+"_amd64.deb"), system)
	})
	t.Run("lintian", func(t *testing.T) {
		t.Parallel()
		out, err := exec.Command("lintian", "--allow-root", "--fail-on", "error,warning", filepath.Join(dist, "vddkcp_"+version+"_amd64.deb")).CombinedOutput()
		if err != nil {
			t.Errorf("lintian: %v\n%s", err, out)
		}
	})
	t.Run("rpm", func(t *testing.T) {
		t.Parallel()
		testRPM(t, filepath.Join(dist, "vddkcp-"+version+".x86_64.rpm"))
	})
	t.Run("image", func(t *testing.T) {
		t.Parallel()
		testImage(t, filepath.Join(dist, "vddkcp-"+version+"-oci.tar"))
	})
}

// makeDist copies the working tree into a new folder, runs "make dist" there, and returns the
// folder with the packages. The argument command is how the shell runs make.
func makeDist(t *testing.T, command string) string {
	t.Helper()
	dir := t.TempDir()
	// The test reads the files itself, so that the go command knows when a cached result is out of
	// date.
	for name := range strings.SplitSeq(peer.Run(t, "git", "-C", "..", "ls-files", "-z", "--cached", "--others", "--exclude-standard"), "\x00") {
		info, err := os.Stat(filepath.Join("..", name))
		if name == "" || errors.Is(err, os.ErrNotExist) { // removed, but not committed yet
			continue
		}
		if err != nil {
			t.Fatal(err)
		}
		path := filepath.Join(dir, name)
		if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(path, read(t, filepath.Join("..", name)), info.Mode().Perm()); err != nil {
			t.Fatal(err)
		}
	}
	cmd := exec.Command("sh", "-ec", "git init -q; git add -A; "+command+" dist VERSION="+described+" COMMIT="+commit+" SOURCE_DATE_EPOCH=1764600000")
	cmd.Dir = dir
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("make dist: %v\n%s", err, out)
	}
	return filepath.Join(dir, "dist")
}

// The function same checks that two folders have files of the same names with the same bytes.
func same(t *testing.T, a, b string) {
	t.Helper()
	names := func(dir string) (names []string) {
		entries, err := os.ReadDir(dir)
		if err != nil {
			t.Fatal(err)
		}
		for _, e := range entries {
			names = append(names, e.Name())
		}
		return names
	}
	want := names(a)
	if got := names(b); !slices.Equal(got, want) || len(want) != 10 {
		t.Fatalf("the second build made %q, the first %q, want 10 files", got, want)
	}
	for _, name := range want {
		if !bytes.Equal(read(t, filepath.Join(a, name)), read(t, filepath.Join(b, name))) {
			t.Errorf("%s differs in two builds", name)
		}
	}
}

func read(t *testing.T, path string) []byte {
	t.Helper()
	content, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	return content
}

// testArchive checks the tar files, the notices in them, the lists of components and the hashes.
func testArchive(t *testing.T, dist string) {
	cmd := exec.Command("sha256sum", "--check", "--strict", "SHA256SUMS")
	cmd.Dir = dist
	if out, err := cmd.CombinedOutput(); err != nil || strings.Count(string(out), ": OK\n") != 9 {
		t.Errorf("sha256sum: %v\n%s", err, out)
	}
	for _, arch := range []string{"amd64", "arm64"} {
		name := "vddkcp-" + version + "-linux-" + arch
		files := untar(t, filepath.Join(dist, name+".tar.gz"))
		for _, file := range []string{"share/doc/vddkcp/LICENSE", "share/doc/vddkcp/README.md", "share/doc/vddkcp/docs/cli.md", "share/doc/vddkcp/examples/README.md",
			"share/vddkcp/jobs.schema.json", "lib/systemd/system/vddkcp-run@.timer", "share/man/man1/vddkcp.1.gz", "share/man/man5/vddkcp-jobs.5.gz",
			"share/bash-completion/completions/vddkcp", "share/zsh/site-functions/_vddkcp", "share/fish/vendor_completions.d/vddkcp.fish"} {
			if len(files[name+"/"+file]) == 0 {
				t.Errorf("%s has no file %s", name, file)
			}
		}
		testLinks(t, files, name+"/share/doc/vddkcp/")
		if unit := string(files[name+"/lib/systemd/system/vddkcp-run@.service"]); !strings.Contains(unit, "ExecStart=/usr/local/bin/vddkcp run ") {
			t.Errorf("the unit in %s does not start /usr/local/bin/vddkcp", name)
		}
		info, err := buildinfo.Read(bytes.NewReader(files[name+"/bin/vddkcp"]))
		if err != nil {
			t.Fatalf("%s: %v", name, err)
		}
		for _, s := range info.Settings {
			if s.Key == "GOARCH" && s.Value != arch || strings.HasPrefix(s.Key, "vcs") {
				t.Errorf("the binary in %s has %s=%s", name, s.Key, s.Value)
			}
		}
		var bom struct {
			BomFormat  string
			Components []struct{ Name, Version string }
		}
		if err := json.Unmarshal(read(t, filepath.Join(dist, name+".cdx.json")), &bom); err != nil || bom.BomFormat != "CycloneDX" {
			t.Fatalf("%s: %q, %v", name, bom.BomFormat, err)
		}
		notices := string(files[name+"/share/doc/vddkcp/THIRD-PARTY-NOTICES"])
		if len(info.Deps) < 5 {
			t.Errorf("%s: only %d modules were looked at", name, len(info.Deps))
		}
		for _, dep := range info.Deps {
			if !strings.Contains(notices, "\n"+dep.Path+" "+dep.Version+", file ") {
				t.Errorf("the notices in %s have no licence of %s %s", name, dep.Path, dep.Version)
			}
			listed := false
			for _, c := range bom.Components {
				listed = listed || c.Name == dep.Path && c.Version == dep.Version
			}
			if !listed {
				t.Errorf("the components of %s lack %s %s", name, dep.Path, dep.Version)
			}
		}
		if !strings.Contains(notices, "\nGo "+runtime.Version()+", file LICENSE:") {
			t.Errorf("the notices in %s have no licence of Go", name)
		}
	}
}

// testLinks checks that the links between the pages in a folder lead to files. The argument files
// has the files of a package by name.
func testLinks(t *testing.T, files map[string][]byte, folder string) {
	t.Helper()
	link := regexp.MustCompile(`\]\(([^)#: ]+)(#[^)]*)?\)`)
	found := 0
	for name, text := range files {
		if !strings.HasPrefix(name, folder) || filepath.Ext(name) != ".md" {
			continue
		}
		for _, m := range link.FindAllSubmatch(text, -1) {
			to := filepath.Join(filepath.Dir(name), string(m[1]))
			if found++; !hasFile(files, to) {
				t.Errorf("%s has a link to %s, which is not in the package", name, m[1])
			}
		}
	}
	if found < 50 {
		t.Errorf("only %d links in %s were looked at", found, folder)
	}
}

// hasFile reports whether a package has the file or the folder.
func hasFile(files map[string][]byte, name string) bool {
	for file := range files {
		if file == name || strings.HasPrefix(file, name+"/") {
			return true
		}
	}
	return false
}

// untar returns the files in a compressed tar file by name.
func untar(t *testing.T, path string) map[string][]byte {
	t.Helper()
	z, err := gzip.NewReader(bytes.NewReader(read(t, path)))
	if err != nil {
		t.Fatal(err)
	}
	return tarFiles(t, z)
}

// tarFiles returns the files in a tar stream by name.
func tarFiles(t *testing.T, from io.Reader) map[string][]byte {
	t.Helper()
	files := map[string][]byte{}
	for r := tar.NewReader(from); ; {
		h, err := r.Next()
		if errors.Is(err, io.EOF) {
			return files
		} else if err != nil {
			t.Fatal(err)
		}
		if files[filepath.Clean(h.Name)], err = io.ReadAll(r); err != nil {
			t.Fatal(err)
		}
	}
}
