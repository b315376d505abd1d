package main

import (
	"archive/tar"
	"bytes"
	"compress/gzip"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"maps"
	"os"
	"os/exec"
	"path"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"time"
)

// The type fileTree contains the files of one layer by name, such as "usr/bin/sh".
type fileTree map[string]*file

type file struct {
	tar.Header
	content []byte
}

func (t fileTree) add(h tar.Header, content []byte) {
	h.Size = int64(len(content))
	h.Format = tar.FormatPAX
	h.AccessTime, h.ChangeTime, h.Uname, h.Gname = time.Time{}, time.Time{}, "", ""
	t[h.Name] = &file{h, content}
}

// pack returns the files as a compressed tar file, and the digest of the tar file before its
// compression. The files are sorted by name, and hard links follow the files that they name.
func (t fileTree) pack() (packed []byte, diffID string, err error) {
	var out bytes.Buffer
	sum := sha256.New()
	z := gzip.NewWriter(&out)
	w := tar.NewWriter(io.MultiWriter(z, sum))
	for _, f := range slices.SortedFunc(maps.Values(t), inOrder) {
		if f.Typeflag == tar.TypeDir {
			f.Name += "/"
		}
		if err := w.WriteHeader(&f.Header); err != nil {
			return nil, "", err
		}
		if _, err := w.Write(f.content); err != nil {
			return nil, "", err
		}
	}
	if err := errors.Join(w.Close(), z.Close()); err != nil {
		return nil, "", err
	}
	return out.Bytes(), "sha256:" + hex.EncodeToString(sum.Sum(nil)), nil
}

func inOrder(a, b *file) int {
	if aLink, bLink := a.Typeflag == tar.TypeLink, b.Typeflag == tar.TypeLink; aLink != bLink {
		if aLink {
			return 1
		}
		return -1
	}
	return strings.Compare(a.Name, b.Name)
}

// unneeded matches files of Debian packages that no program in the image reads. The copyright
// files in /usr/share/doc stay.
var unneeded = regexp.MustCompile(`^(usr/share/(man|info|locale|lintian|bash-completion|debianutils|menu|bug|base-files|gdb|gcc)(/|$)|usr/share/doc/.*/|usr/share/doc/[^/]+/([^c]|c[^o])|etc/(update-motd|profile)\.d|usr/sbin/update-ca|usr/share/ca-certificates(/|$)|etc/ca-certificates|usr/lib/[^/]+/gconv(/|$))`)

// systemFiles returns the files of all Debian packages in a folder, and the files that the
// packages would make when they are installed.
func systemFiles(debs string, created time.Time) (fileTree, error) {
	packages, err := filepath.Glob(filepath.Join(debs, "*.deb"))
	if err != nil {
		return nil, err
	}
	if len(packages) == 0 {
		return nil, fmt.Errorf("%s: no Debian packages", debs)
	}
	t, certificates := fileTree{}, map[string][]byte{}
	for _, p := range packages {
		if err := t.unpack(p, created, certificates); err != nil {
			return nil, fmt.Errorf("%s: %w", p, err)
		}
	}
	if len(certificates) == 0 {
		return nil, fmt.Errorf("%s: no package has certificates in /usr/share/ca-certificates", debs)
	}
	var bundle bytes.Buffer
	for _, name := range slices.Sorted(maps.Keys(certificates)) {
		bundle.Write(append(bytes.TrimSpace(certificates[name]), '\n'))
	}
	text := func(name, content string) {
		t.add(tar.Header{Name: name, Typeflag: tar.TypeReg, Mode: 0o644, ModTime: created}, []byte(content))
	}
	for _, folder := range []string{"etc/ssl", "etc/ssl/certs", "media", "mnt", "opt", "srv"} {
		t.add(tar.Header{Name: folder, Typeflag: tar.TypeDir, Mode: 0o755, ModTime: created}, nil)
	}
	text("etc/ssl/certs/ca-certificates.crt", bundle.String())
	// The user is qemu, as in KubeVirt's images, which then can read the disks.
	text("etc/passwd", "root:x:0:0:root:/root:/usr/sbin/nologin\nqemu:x:107:107:qemu:/:/usr/sbin/nologin\nnobody:x:65534:65534:nobody:/:/usr/sbin/nologin\n")
	text("etc/group", "root:x:0:\nqemu:x:107:\nnogroup:x:65534:\n")
	text("etc/nsswitch.conf", "passwd: files\ngroup: files\nhosts: files dns\n")
	return t, nil
}

// The method unpack adds the files of a Debian package. It puts the certificates of the package
// into a map instead, from which the caller makes one file, as update-ca-certificates does.
func (t fileTree) unpack(deb string, created time.Time, certificates map[string][]byte) error {
	control, err := output("dpkg-deb", "-f", deb)
	if err != nil {
		return err
	}
	name, err := output("dpkg-deb", "-f", deb, "Package")
	if err != nil {
		return err
	}
	data, err := output("dpkg-deb", "--fsys-tarfile", deb)
	if err != nil {
		return err
	}
	for r := tar.NewReader(bytes.NewReader(data)); ; {
		h, err := r.Next()
		if errors.Is(err, io.EOF) {
			break
		} else if err != nil {
			return err
		}
		content, err := io.ReadAll(r)
		if err != nil {
			return err
		}
		h.Name = strings.TrimPrefix(path.Clean(h.Name), "./")
		if strings.HasPrefix(h.Name, "usr/share/ca-certificates/") && strings.HasSuffix(h.Name, ".crt") {
			certificates[h.Name] = content
		}
		if h.Name == "." || unneeded.MatchString(h.Name) {
			continue
		}
		if h.Typeflag == tar.TypeLink {
			h.Linkname = path.Clean(h.Linkname)
		}
		if h.ModTime.After(created) {
			h.ModTime = created
		}
		t.add(*h, content)
	}
	// Scanners for vulnerabilities read from here which packages are in an image without dpkg.
	for _, folder := range []string{"var", "var/lib", "var/lib/dpkg", "var/lib/dpkg/status.d"} {
		if t[folder] == nil {
			t.add(tar.Header{Name: folder, Typeflag: tar.TypeDir, Mode: 0o755, ModTime: created}, nil)
		}
	}
	status := tar.Header{Name: "var/lib/dpkg/status.d/" + string(bytes.TrimSpace(name)), Typeflag: tar.TypeReg, Mode: 0o644, ModTime: created}
	t.add(status, control)
	return nil
}

// ownFiles returns the files below a folder, which belong to root in the image.
func ownFiles(dir string, created time.Time) (fileTree, error) {
	t := fileTree{}
	err := filepath.WalkDir(dir, func(p string, e fs.DirEntry, err error) error {
		if err != nil || p == dir {
			return err
		}
		name, err := filepath.Rel(dir, p)
		if err != nil {
			return err
		}
		if e.IsDir() {
			t.add(tar.Header{Name: name, Typeflag: tar.TypeDir, Mode: 0o755, ModTime: created}, nil)
			return nil
		}
		info, err := e.Info()
		if err != nil {
			return err
		}
		content, err := os.ReadFile(p)
		if err != nil {
			return err
		}
		mode := int64(0o644)
		if info.Mode()&0o100 != 0 {
			mode = 0o755
		}
		t.add(tar.Header{Name: name, Typeflag: tar.TypeReg, Mode: mode, ModTime: created}, content)
		return nil
	})
	if err == nil && len(t) == 0 {
		err = fmt.Errorf("%s: no files", dir)
	}
	return t, err
}

func output(program string, args ...string) ([]byte, error) {
	cmd := exec.Command(program, args...)
	var stderr bytes.Buffer
	cmd.Stderr = &stderr
	out, err := cmd.Output()
	if err != nil {
		return nil, fmt.Errorf("%s: %w\n%s", cmd, err, &stderr)
	}
	return out, nil
}
