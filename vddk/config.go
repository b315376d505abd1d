package vddk

import (
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
	// The keys of the library's configuration that say how much memory each
	// connection has on the host, and what they are here without a word of the
	// user's: migration tools found 1 MiB x 4 to be fastest.
	keyBufSize  = "vixDiskLib.nfcAio.Session.BufSizeIn64KB"
	keyBufCount = "vixDiskLib.nfcAio.Session.BufCount"

	maxConfig = 1 << 20
)

var defaultBuffers = NFCBuffers{Size: 16 * nfcbudget.Unit, Count: 4}

// libraryConfig is the configuration that the library gets: the user's own and
// what it leaves open.
type libraryConfig struct {
	text    string // the user's, without what is set here
	from    string // its path; "": there is none
	buffers NFCBuffers
}

// readConfig reads the first of p.Config, /etc/vmware/config and
// ~/.vmware/config that exists, which is where the library looks when it is
// given no file.
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
			return nil, fmt.Errorf("configuration file of VDDK: %w", err)
		}
		return parseConfig(path, text, p.NFCBuffers)
	}
	return parseConfig("", "", p.NFCBuffers)
}

func readSmall(path string) (string, error) {
	f, err := os.Open(path)
	if err != nil {
		return "", err
	}
	defer f.Close()
	text, err := io.ReadAll(io.LimitReader(f, maxConfig+1))
	if err == nil && len(text) > maxConfig {
		err = fmt.Errorf("%s: larger than %d bytes", path, maxConfig)
	}
	return string(text), err
}

// parseConfig reads text, whose lines are KEY = "VALUE". Buffers that are asked
// for by flag go before those of the file, and these before the default.
func parseConfig(path, text string, asked NFCBuffers) (*libraryConfig, error) {
	c := &libraryConfig{from: path}
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
			return nil, fmt.Errorf("%s: line %d: %s is %q, want a number from 1 to 65535", path, n+1, key, value)
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
		Size:  firstSet(asked.Size, file.Size, defaultBuffers.Size),
		Count: firstSet(asked.Count, file.Count, defaultBuffers.Count),
	}
	if c.buffers.Size%nfcbudget.Unit != 0 || c.buffers.Size < 0 || c.buffers.Count < 0 {
		return nil, fmt.Errorf("NFC buffers of %d bytes x %d: want a multiple of 64 KiB", c.buffers.Size, c.buffers.Count)
	}
	return c, nil
}

func firstSet[T int | int64](values ...T) T {
	for _, v := range values {
		if v != 0 {
			return v
		}
	}
	return 0
}

// file returns the file's content for buffers b.
func (c *libraryConfig) file(b NFCBuffers) []byte {
	return fmt.Appendf(nil, "%s%s=%d\n%s=%d\n", c.text, keyBufSize, b.Size/nfcbudget.Unit, keyBufCount, b.Count)
}

// configFile is a file that this process alone has, and that is gone with it:
// what a configuration holds may be secret.
type configFile struct {
	*os.File
	path string // for a process of the same user
}

func newConfigFile(content []byte) (*configFile, error) {
	fd, err := unix.MemfdCreate("vddkcp-vddk-config", unix.MFD_CLOEXEC)
	if err != nil {
		return nil, fmt.Errorf("configuration file for VDDK: memfd_create: %w", err)
	}
	f := &configFile{os.NewFile(uintptr(fd), "configuration file for VDDK"), fmt.Sprintf("/proc/%d/fd/%d", os.Getpid(), fd)}
	if _, err := f.Write(content); err != nil {
		f.Close()
		return nil, err
	}
	if _, err := os.Stat("/proc/self/fd"); err != nil {
		f.Close()
		return nil, fmt.Errorf("configuration file for VDDK: the library opens it through /proc, which is not mounted: %w", err)
	}
	return f, nil
}
