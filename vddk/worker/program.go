package worker

import (
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"

	"golang.org/x/sys/unix"
)

// ProgramName is the file name of the worker program. It is also its argv[0].
const ProgramName = "vddkcp-vddk-worker"

// EmbeddedSHA256 returns the SHA-256 of the embedded worker program, in hexadecimal. The result is
// "" if no program is embedded.
func EmbeddedSHA256() string {
	code, err := embedded.ReadFile("bin/" + ProgramName)
	if err != nil {
		return ""
	}
	sum := sha256.Sum256(code)
	return hex.EncodeToString(sum[:])
}

// startProgram starts the worker program. The given files become the file descriptors 0 to 4 of the
// program. If path is not "", it names the program. Otherwise the embedded program is started or,
// if that is not possible, an installed one.
func startProgram(path string, env []string, files []*os.File) (*os.Process, error) {
	if path != "" {
		p, err := startFile(path, env, files)
		if err != nil && !outOf(err) {
			return nil, &ProgramError{Tried: []error{err}}
		}
		return p, err
	}
	var tried []error
	if code, err := embedded.ReadFile("bin/" + ProgramName); err != nil {
		tried = append(tried, errors.New("no worker program is embedded in this executable"))
	} else {
		p, err := startMemory(code, env, files)
		if err == nil || outOf(err) {
			return p, err
		}
		tried = append(tried, fmt.Errorf("the embedded worker program does not start: %w", err))
	}
	self, err := os.Executable()
	if err != nil {
		return nil, &ProgramError{Tried: append(tried, err)}
	}
	for _, path := range installed(self) {
		p, err := startFile(path, env, files)
		if err == nil || outOf(err) {
			return p, err
		}
		tried = append(tried, err)
	}
	return nil, &ProgramError{Tried: tried}
}

// The function installed returns the paths at which the worker program may be installed. They
// depend on the path of the given executable, which is the program that starts the worker.
func installed(executable string) []string {
	dir := filepath.Dir(executable)
	return []string{filepath.Join(dir, ProgramName), filepath.Join(dir, "../libexec/vddkcp", ProgramName)}
}

// startMemory starts a program without a file on disk. The parameter code has the content of the
// executable file. If the sysctl vm.memfd_noexec forbids such a start, the error is EACCES.
func startMemory(code []byte, env []string, files []*os.File) (*os.Process, error) {
	// Newer kernels log a warning if the flag MFD_EXEC is missing. Older kernels refuse the flag
	// with EINVAL, and memfd_create is then called without it.
	fd, err := unix.MemfdCreate(ProgramName, unix.MFD_CLOEXEC|unix.MFD_ALLOW_SEALING|unix.MFD_EXEC)
	if errors.Is(err, unix.EINVAL) {
		fd, err = unix.MemfdCreate(ProgramName, unix.MFD_CLOEXEC|unix.MFD_ALLOW_SEALING)
	}
	if err != nil {
		return nil, fmt.Errorf("memfd_create: %w", err)
	}
	file := os.NewFile(uintptr(fd), ProgramName)
	defer file.Close()
	if _, err := file.Write(code); err != nil {
		return nil, err
	}
	if _, err := unix.FcntlInt(file.Fd(), unix.F_ADD_SEALS, unix.F_SEAL_WRITE|unix.F_SEAL_SHRINK|unix.F_SEAL_GROW); err != nil {
		return nil, fmt.Errorf("cannot seal the memory of the program: %w", err)
	}
	// The given files become the first descriptors of the child process. The program itself becomes
	// descriptor programFD, and the child executes it through /proc. Then the worker closes
	// programFD.
	p, err := start(fmt.Sprintf("/proc/self/fd/%d", programFD), env, append(files[:len(files):len(files)], file))
	if errors.Is(err, fs.ErrNotExist) {
		return nil, notFound("/proc/self/fd")
	}
	return p, err
}

// errNoLinker says that the dynamic linker that the program names does not exist. The kernel
// reports that in the same way as a program that does not exist, with ENOENT.
var errNoLinker = errors.New("the dynamic linker of the program is missing: VDDK needs a system with glibc")

// notFound explains why the kernel did not find the program, which was started through a path in
// /proc/self/fd. The parameter descriptors is the path of that folder; tests pass another one.
func notFound(descriptors string) error {
	if _, err := os.Stat(descriptors); err != nil {
		return fmt.Errorf("/proc is not mounted, and the program is started through it: %w", err)
	}
	return errNoLinker
}

// startFile starts the program at path by calling start. If the kernel does not find the program
// although the file exists, the error wraps errNoLinker.
func startFile(path string, env []string, files []*os.File) (*os.Process, error) {
	p, err := start(path, env, files)
	if errors.Is(err, fs.ErrNotExist) {
		if _, statErr := os.Stat(path); statErr == nil {
			return nil, fmt.Errorf("%s: %w", path, errNoLinker)
		}
	}
	return p, err
}

// The function start starts the program at path, with the given environment and file descriptors.
func start(path string, env []string, files []*os.File) (*os.Process, error) {
	return os.StartProcess(path, []string{ProgramName}, &os.ProcAttr{
		Env:   env,
		Files: files,
		// The worker gets a session of its own (in the sense of setsid) for two reasons. Ctrl-C on
		// the terminal must not send it a signal, since this process may still need the worker. And
		// the library must not ask for a password on the terminal.
		Sys: &unix.SysProcAttr{Setsid: true},
	})
}
