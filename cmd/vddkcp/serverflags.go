package main

import (
	"context"
	"fmt"
	"strings"

	"github.com/vddkcp/vddkcp/internal/certificate"
	"github.com/vddkcp/vddkcp/internal/grace"
	"github.com/vddkcp/vddkcp/internal/printable"
	"github.com/vddkcp/vddkcp/internal/secret"
	"github.com/vddkcp/vddkcp/internal/usage"
	"github.com/vddkcp/vddkcp/vsphere"
)

// serverFlags are the flags of every command that logs in to an ESXi host or a vCenter
// server.
type serverFlags struct {
	Server     string        `help:"Name or address of the ESXi host or vCenter server." placeholder:"HOST" group:"VDDK:"`
	User       string        `help:"User name for the server." placeholder:"NAME" group:"VDDK:"`
	Password   secretFlag    `help:"Password for the server: \"-\" asks for it on the terminal, +FILE reads the first line of a file, -FD reads the first line from a file descriptor, and any other VALUE is the password itself, which other users can see in the list of processes. Default: the environment variable VDDKCP_PASSWORD." placeholder:"-|+FILE|-FD|VALUE" group:"VDDK:"`
	Cookie     secretFlag    `help:"Session cookie to use instead of user name and password, in the same forms as --password. Default: the environment variable VDDKCP_COOKIE." placeholder:"-|+FILE|-FD|VALUE" group:"VDDK:"`
	Thumbprint string        `help:"SHA-1 or SHA-256 thumbprint of the server's certificate. Without this flag, a trusted authority must have signed the certificate." placeholder:"HEX" group:"VDDK:"`
	Port       portFlag      `help:"Port of the server (default 443)." placeholder:"PORT" group:"VDDK:"`
	secrets    serverSecrets `kong:"-"`
}

// serverSecrets hold the secrets, which are read once for all disks.
type serverSecrets struct {
	environment      *secretEnvironment
	password, cookie secret.Secret
	read             bool
	pause            func() (resume func()) // hides the progress display until resume is called; nil without a display
}

// AfterApply is called by kong after parsing. It keeps the secrets from the
// environment. They are used if no flag gives a secret.
func (f *serverFlags) AfterApply(environment *secretEnvironment) error {
	f.secrets.environment = environment
	return nil
}

// The method expected returns which secrets the method readSecrets will return. An empty
// secret stands for each secret that is not read yet, because reading it may ask the user.
func (f *serverFlags) expected() (password, cookie secret.Secret) {
	if f.secrets.read {
		return f.secrets.password, f.secrets.cookie
	}
	if f.secrets.environment != nil {
		password, cookie = f.secrets.environment.password, f.secrets.environment.cookie
	}
	if f.Password.form != notGiven {
		password = secret.New("")
	}
	if f.Cookie.form != notGiven {
		cookie = secret.New("")
	}
	return password, cookie
}

// The method readSecrets returns the password and the cookie. The first call reads them, and
// may ask the user for them.
func (f *serverFlags) readSecrets(ctx context.Context, warn func(string)) (password, cookie secret.Secret, err error) {
	if f.secrets.read {
		return f.secrets.password, f.secrets.cookie, nil
	}
	password, cookie = f.expected()
	for _, s := range []struct {
		name string
		flag secretFlag
		into *secret.Secret
	}{
		{"password", f.Password, &password}, {"cookie", f.Cookie, &cookie},
	} {
		if s.flag.form == notGiven {
			continue
		}
		if s.flag.form == inPlain {
			warn(fmt.Sprintf("other users of this host can see a --%s on the command line: use -, +FILE or VDDKCP_%s instead", s.name, strings.ToUpper(s.name)))
		}
		label := fmt.Sprintf("%s of %s at %s", s.name, printable.Name(f.User), printable.Name(withoutBrackets(f.Server)))
		text, err := s.flag.read(ctx, f.secrets.pause, label)
		if grace.Original(ctx).Err() != nil {
			return secret.Secret{}, secret.Secret{}, err
		}
		if err != nil {
			return secret.Secret{}, secret.Secret{}, usage.Wrap(fmt.Errorf("--%s: %w", s.name, err))
		}
		*s.into = text
	}
	f.secrets.password, f.secrets.cookie, f.secrets.read = password, cookie, true
	return password, cookie, nil
}

// The method connection returns how to reach the server and how to log in there, for
// commands that need only the server and no disk. It checks all other flags before it reads
// the secrets, which may ask the user. The parameter warn is called with warnings.
func (f *serverFlags) connection(ctx context.Context, warn func(string)) (vsphere.Options, error) {
	if err := f.validate(); err != nil {
		return vsphere.Options{}, err
	}
	password, cookie, err := f.readSecrets(ctx, warn)
	if err != nil {
		return vsphere.Options{}, err
	}
	return vsphere.Options{
		Server: withoutBrackets(f.Server), Port: uint32(f.Port), User: f.User, Thumbprint: f.Thumbprint,
		Password: password, Cookie: cookie,
	}, nil
}

// The method validate returns an error if the flags do not name a server, or do not say how to
// log in.
func (f *serverFlags) validate() error {
	password, cookie := f.expected()
	var missing []string
	if f.Server == "" {
		missing = append(missing, "--server")
	}
	if f.User == "" && !cookie.IsSet() {
		missing = append(missing, "--user")
	}
	if !password.IsSet() && !cookie.IsSet() {
		missing = append(missing, "--password or --cookie")
	}
	if len(missing) > 0 {
		return usage.New("missing: "+strings.Join(missing, ", "),
			"the password can also be in the environment variable VDDKCP_PASSWORD, or the cookie of an open session in VDDKCP_COOKIE")
	}
	server := withoutBrackets(f.Server)
	if strings.ContainsAny(server, "/ \t\n\x00@[]") || strings.HasPrefix(server, "-") {
		return usage.Errorf("--server: %q: expected only the name or the address of a host", server)
	}
	if strings.Count(server, ":") == 1 {
		return usage.New(fmt.Sprintf("--server: %q: expected only the name or the address of a host", server),
			"if the server has another port than 443, pass the port with --port and not as a part of --server")
	}
	if f.Thumbprint != "" {
		if _, err := certificate.ParseThumbprint(f.Thumbprint); err != nil {
			return usage.Errorf("--thumbprint: %w", err)
		}
	}
	return nil
}

// withoutBrackets returns the address in "[::1]" without its brackets.
func withoutBrackets(server string) string {
	if address, ok := strings.CutPrefix(server, "["); ok {
		return strings.TrimSuffix(address, "]")
	}
	return server
}
