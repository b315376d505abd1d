package vddk

import (
	"cmp"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"strconv"
	"strings"

	"github.com/vddkcp/vddkcp/internal/nfcbudget"
	"golang.org/x/sys/unix"
)

const (
	// The library reads these keys from its configuration file. They set the size and the number
	// of the buffers that the ESXi host reserves for each connection.
	keyBufSize  = "vixDiskLib.nfcAio.Session.BufSizeIn64KB"
	keyBufCount = "vixDiskLib.nfcAio.Session.BufCount"

	maxConfig = 1 << 20 // bytes of the user's configuration file
)

// defaultBuffers are used if neither the user nor the configuration file sets the buffers.
// Authors of migration tools measured that 4 buffers of 1 MiB are the fastest.
var defaultBuffers = NFCBuffers{Size: 16 * nfcbudget.Unit, Count: 4}

// libraryConfig is the content of the configuration file that is passed to the library.
type libraryConfig struct {
	text    string // the user's configuration file without the keys of the buffers
	buffers NFCBuffers
}

// readConfig reads the user's configuration file for the library. If p.Config names a file, it is
// this file. If p.Config is empty, readConfig reads the first of these files that exists:
// /etc/vmware/config and ~/.vmware/config. The library itself reads them if it is given no other
// file.
func readConfig(p *Params) (*libraryConfig, error) {
	places := []string{"/etc/vmware/config"}
	if home, err := os.UserHomeDir(); err == nil {
		places = append(places, filepath.Join(home, ".vmware/config"))
	}
	if p.Config != "" {
		places = []string{p.Config}
	}
	for _, path := range places {
		text, err := readSmall(path)
		if p.Config == "" && (errors.Is(err, fs.ErrNotExist) || errors.Is(err, fs.ErrPermission)) {
			continue
		}
		if err != nil {
			return nil, fmt.Errorf("cannot read the configuration file of VDDK: %w", err)
		}
		return parseConfig(path, text, p.NFCBuffers)
	}
	return parseConfig("", "", p.NFCBuffers)
}

// readSmall returns the content of the file at path. A file of more than maxConfig bytes is an
// error.
func readSmall(path string) (string, error) {
	f, err := os.Open(path)
	if err != nil {
		return "", err
	}
	defer f.Close()
	text, err := io.ReadAll(io.LimitReader(f, maxConfig+1))
	if err == nil && len(text) > maxConfig {
		err = fmt.Errorf("%s is larger than %d bytes, the largest configuration file that is accepted", path, maxConfig)
	}
	return string(text), err
}

// parseConfig parses a configuration file with lines KEY = "VALUE". The parameter text is its
// content, and path is its name in errors. The size of the buffers is taken from the command line,
// else from the file, else from defaultBuffers. The same holds for the number of the buffers. The
// parameter flag holds the size and the number that the command line sets. Each of the two is 0 if
// the command line does not set it.
func parseConfig(path, text string, flag NFCBuffers) (*libraryConfig, error) {
	c := new(libraryConfig)
	var file NFCBuffers
	var kept strings.Builder
	for n, line := range strings.Split(text, "\n") {
		key, value, _ := strings.Cut(line, "=")
		key = strings.TrimSpace(key)
		size, count := strings.EqualFold(key, keyBufSize), strings.EqualFold(key, keyBufCount)
		if !size && !count {
			kept.WriteString(strings.TrimSuffix(line, "\r") + "\n")
			continue
		}
		value = strings.Trim(strings.TrimSpace(value), `"`)
		v, err := strconv.ParseUint(value, 10, 16)
		if err != nil || v == 0 {
			return nil, fmt.Errorf("%s: line %d: %s is %q, expected a number from 1 to 65535", path, n+1, key, value)
		}
		if size {
			file.Size = int64(v) * nfcbudget.Unit
		} else {
			file.Count = int(v)
		}
	}
	c.text = strings.TrimRight(kept.String(), "\n")
	if c.text != "" {
		c.text += "\n"
	}
	c.buffers = NFCBuffers{
		Size:  cmp.Or(flag.Size, file.Size, defaultBuffers.Size),
		Count: cmp.Or(flag.Count, file.Count, defaultBuffers.Count),
	}
	if c.buffers.Size%nfcbudget.Unit != 0 || c.buffers.Size < 0 || c.buffers.Count < 0 {
		return nil, fmt.Errorf("invalid NFC buffers, %[2]d of %[1]d bytes each: the size must be a multiple of 64 KiB", c.buffers.Size, c.buffers.Count)
	}
	return c, nil
}

// The method file returns the content of the configuration file for a connection with the given
// buffers.
func (c *libraryConfig) file(b NFCBuffers) []byte {
	return fmt.Appendf(nil, "%s%s=%d\n%s=%d\n", c.text, keyBufSize, b.Size/nfcbudget.Unit, keyBufCount, b.Count)
}

// configFile is a file in memory, because a configuration may hold secrets. It disappears with
// this process.
type configFile struct {
	*os.File
	path string // a path that other processes of the same user can open
}

func newConfigFile(content []byte) (*configFile, error) {
	fd, err := unix.MemfdCreate("vddkcp-vddk-config", unix.MFD_CLOEXEC)
	if err != nil {
		return nil, fmt.Errorf("cannot create a configuration file for VDDK: memfd_create: %w", err)
	}
	f := &configFile{os.NewFile(uintptr(fd), "configuration file for VDDK"), fmt.Sprintf("/proc/%d/fd/%d", os.Getpid(), fd)}
	if _, err := f.Write(content); err != nil {
		f.Close()
		return nil, err
	}
	if _, err := os.Stat("/proc/self/fd"); err != nil {
		f.Close()
		return nil, fmt.Errorf("cannot pass a configuration file to VDDK: the library opens it through /proc, which is not mounted: %w", err)
	}
	return f, nil
}
