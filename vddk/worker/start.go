package worker

import (
	"context"
	"errors"
	"fmt"
	"os"
	"runtime"
	"strings"

	"golang.org/x/sys/unix"
)

// Start starts a worker process, which loads and initialises the library. ctx only limits the
// start: after that, the process runs until Close or Kill is called, or this process ends. The
// error may be a *StartError, *ProgramError, *LoadError, *Error (from the function InitEx) or
// *GoneError.
func Start(ctx context.Context, c Config) (*Process, error) {
	if runtime.GOARCH != "amd64" {
		return nil, fmt.Errorf("VDDK needs x86-64, this machine is %s", runtime.GOARCH)
	}
	if err := c.check(); err != nil {
		return nil, err
	}
	p, err := spawn(c, func(env []string, files []*os.File) (*os.Process, error) {
		return startProgram(c.Program, env, files)
	})
	if err != nil && outOf(err) {
		return nil, &StartError{err}
	}
	if err != nil {
		return nil, err
	}
	if err := p.init(ctx); err != nil {
		p.Release()
		return nil, err
	}
	return p, nil
}

// The method check returns an error if a field of c has an impossible value.
func (c *Config) check() error {
	switch {
	case c.Slots < 1 || c.Slots > MaxSlots:
		return fmt.Errorf("the worker cannot have %d slots, expected 1 to %d", c.Slots, MaxSlots)
	case c.SlotSize < 4096 || c.SlotSize > MaxSlotSize || c.SlotSize%4096 != 0:
		return fmt.Errorf("the worker cannot have slots of %d bytes, expected a multiple of 4096 up to %d", c.SlotSize, MaxSlotSize)
	case c.Library == "":
		return errors.New("the path of the library is empty")
	case c.Version < 0:
		return fmt.Errorf("version %d of the library is negative", c.Version)
	}
	for _, s := range []string{c.Library, c.Root, c.ConfigFile} {
		if len(s) > unix.PathMax {
			return fmt.Errorf("the path of a file for the worker has %d bytes, expected at most %d", len(s), unix.PathMax)
		}
		if strings.IndexByte(s, 0) >= 0 {
			return fmt.Errorf("the path %q contains a NUL byte", s)
		}
	}
	return nil
}

// spawn creates the shared memory, the socket and the output pipe of a worker, and starts its
// process with the function startProcess. It also starts the goroutines that receive from the
// process. The files that are passed to startProcess become the descriptors 0 to 4 of the process.
func spawn(c Config, startProcess func(env []string, files []*os.File) (*os.Process, error)) (p *Process, err error) {
	null, err := os.Open(os.DevNull)
	if err != nil {
		return nil, err
	}
	defer null.Close()
	output, theirOutput, err := outputPipe()
	if err != nil {
		return nil, err
	}
	defer theirOutput.Close()
	socket, theirSocket, err := socketPair()
	if err != nil {
		output.Close()
		return nil, err
	}
	defer theirSocket.Close()
	memory, file, err := sharedMemory(c.Slots * c.SlotSize)
	if err != nil {
		output.Close()
		socket.Close()
		return nil, err
	}
	defer file.Close()
	process, err := startProcess(environ(c.Env, c.Dir), []*os.File{null, theirOutput, theirOutput, theirSocket, file})
	if err != nil {
		output.Close()
		socket.Close()
		unix.Munmap(memory)
		return nil, err
	}
	return newProcess(c, process, socket, output, memory), nil
}

// outputPipe returns the two ends of a pipe for the output of a worker. Go's runtime needs our end
// to be non-blocking. The end that the worker gets is blocking, as programs expect of their output.
func outputPipe() (ours, theirs *os.File, err error) {
	var fds [2]int
	if err := unix.Pipe2(fds[:], unix.O_CLOEXEC); err != nil {
		return nil, nil, fmt.Errorf("pipe: %w", err)
	}
	if err := unix.SetNonblock(fds[0], true); err != nil {
		unix.Close(fds[0])
		unix.Close(fds[1])
		return nil, nil, err
	}
	return os.NewFile(uintptr(fds[0]), "worker output"), os.NewFile(uintptr(fds[1]), "worker output"), nil
}

// socketPair returns two connected sockets. Our end is non-blocking. With SOCK_SEQPACKET,
// several threads can send messages without a lock, and each side notices when the other one
// closes.
func socketPair() (ours, theirs *os.File, err error) {
	fds, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_SEQPACKET|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return nil, nil, fmt.Errorf("socketpair: %w", err)
	}
	// On some systems, the default size of a socket's buffer is small. The size that is set here
	// has room for at least three packets.
	for _, fd := range fds {
		unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_SNDBUF, 4*maxPacket)
	}
	if err := unix.SetNonblock(fds[0], true); err != nil {
		unix.Close(fds[0])
		unix.Close(fds[1])
		return nil, nil, err
	}
	return os.NewFile(uintptr(fds[0]), "worker socket"), os.NewFile(uintptr(fds[1]), "worker socket"), nil
}

// sharedMemory returns memory outside of Go's heap, and the file that it is mapped from. The file
// is sealed, so that nobody can change its size: after the file was truncated, access to the memory
// would cause a SIGBUS.
func sharedMemory(size int) (memory []byte, file *os.File, err error) {
	flags := unix.MFD_CLOEXEC | unix.MFD_ALLOW_SEALING
	fd, err := unix.MemfdCreate("vddkcp buffers", flags|unix.MFD_NOEXEC_SEAL)
	if errors.Is(err, unix.EINVAL) { // Linux before 6.3 does not know MFD_NOEXEC_SEAL
		fd, err = unix.MemfdCreate("vddkcp buffers", flags)
	}
	if err != nil {
		return nil, nil, fmt.Errorf("memfd_create: %w", err)
	}
	file = os.NewFile(uintptr(fd), "vddkcp buffers")
	if err = unix.Ftruncate(fd, int64(size)); err == nil {
		_, err = unix.FcntlInt(uintptr(fd), unix.F_ADD_SEALS, unix.F_SEAL_SHRINK|unix.F_SEAL_GROW|unix.F_SEAL_SEAL)
	}
	if err == nil {
		memory, err = unix.Mmap(fd, 0, size, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED)
	}
	if err != nil {
		file.Close()
		return nil, nil, fmt.Errorf("cannot create shared memory of %d bytes: %w", size, err)
	}
	return memory, file, nil
}

// The method init sends the request "init", after which the worker loads and initialises the
// library.
func (p *Process) init(ctx context.Context) error {
	r, err := p.control(ctx, message{kind: kindInit}, appendInit(nil, &p.config))
	var fault *faultError
	if errors.As(err, &fault) {
		e := &LoadError{Library: p.config.Library, Text: fault.text}
		if fault.op == "dlsym" {
			e.Functions = missingFunctions(r.sectors)
		} else {
			e.Libraries = MissingLibraries(p.config.Library, p.config.Dir)
		}
		return e
	}
	if err != nil {
		return err
	}
	list, err := parseStrings(r.payload, 1)
	if err != nil {
		return p.breach(fmt.Errorf(`the answer to the request "init" is invalid: %w`, err))
	}
	p.present, p.modes = r.sectors, list[0]
	return nil
}
