package main

import (
	"bufio"
	"context"
	"fmt"
	"net"
	"strconv"
	"strings"
	"time"

	"github.com/vddkcp/vddkcp/internal/certificate"
	"github.com/vddkcp/vddkcp/internal/printable"
	"github.com/vddkcp/vddkcp/internal/usage"
)

type thumbprintCommand struct {
	Host    string   `arg:"" name:"HOST[:PORT]" help:"Name or address of the ESXi host or vCenter server; the default port is 443. Write an IPv6 address in brackets if a port follows it."`
	JSON    bool     `name:"json" help:"Print JSON."`
	Timeout patience `help:"Time limit for the answer of the server (default 30s)." default:"30s" placeholder:"TIME"`
}

// certificateFacts is what vddkcp thumbprint prints, as text or as JSON.
type certificateFacts struct {
	Server    string    `json:"server"`
	Subject   string    `json:"subject"`
	Issuer    string    `json:"issuer"`
	NotBefore time.Time `json:"not_before"`
	NotAfter  time.Time `json:"not_after"`
	SHA1      string    `json:"sha1"`
	SHA256    string    `json:"sha256"`
	Verifies  bool      `json:"verifies"`
	Reason    string    `json:"reason,omitempty"` // why the certificate does not verify
}

func (c *thumbprintCommand) Run(ctx context.Context, logs *logFlags) error {
	host, port, err := splitHost(c.Host)
	if err != nil {
		return usage.Errorf("thumbprint: %w", err)
	}
	got, err := fetchCertificate(ctx, host, port, time.Duration(c.Timeout))
	if err != nil {
		return fmt.Errorf("thumbprint %s: %w", c.Host, err)
	}
	facts := factsOf(host, port, got)
	out := standardOutput(ctx)
	if c.JSON {
		err = printJSON(out, facts)
	} else {
		w := bufio.NewWriter(out)
		facts.printText(w)
		err = w.Flush()
	}
	if err != nil {
		return fmt.Errorf("thumbprint %s: %w", c.Host, err)
	}
	if !facts.Verifies {
		logs.warn("the certificate is not verified: before you trust its thumbprint, compare it with the one that the host itself shows")
	}
	return nil
}

// fetchCertificate returns the certificate of a server, which must answer within the given time.
func fetchCertificate(ctx context.Context, host string, port uint32, timeout time.Duration) (*certificate.Certificate, error) {
	ctx, cancel := context.WithTimeoutCause(ctx, timeout, fmt.Errorf("the server did not answer within %s", timeout))
	defer cancel()
	got, err := certificate.Fetch(ctx, host, port)
	if err != nil && ctx.Err() != nil {
		err = context.Cause(ctx)
	}
	return got, err
}

// factsOf describes the certificate of a server.
func factsOf(host string, port uint32, got *certificate.Certificate) *certificateFacts {
	facts := &certificateFacts{
		Server:  net.JoinHostPort(host, strconv.FormatUint(uint64(port), 10)),
		Subject: got.Leaf.Subject.String(), Issuer: got.Leaf.Issuer.String(),
		NotBefore: got.Leaf.NotBefore, NotAfter: got.Leaf.NotAfter,
		SHA1: got.SHA1, SHA256: got.SHA256, Verifies: got.Trust == nil,
	}
	if got.Trust != nil {
		facts.Reason = got.Trust.Error()
	}
	return facts
}

func (f *certificateFacts) printText(w *bufio.Writer) {
	line := func(key, value string) { fmt.Fprintf(w, "%-12s %s\n", key, printable.Name(value)) }
	line("server:", f.Server)
	line("subject:", f.Subject)
	line("issuer:", f.Issuer)
	line("valid:", f.NotBefore.UTC().Format(time.DateTime)+" to "+f.NotAfter.UTC().Format(time.DateTime)+" UTC")
	line("SHA-1:", f.SHA1)
	line("SHA-256:", f.SHA256)
	if f.Verifies {
		line("verifies:", "yes")
	} else {
		line("verifies:", "no: "+f.Reason)
	}
}

// splitHost splits HOST[:PORT]. The brackets of an IPv6 address are optional
// if no port follows.
func splitHost(s string) (host string, port uint32, err error) {
	if strings.ContainsAny(s, "/@ \t\n") {
		return "", 0, fmt.Errorf("%q: want only the name or address of a server, as HOST or HOST:PORT", s)
	}
	host, port = s, certificate.DefaultPort
	number := ""
	switch {
	case strings.HasPrefix(s, "[") && strings.HasSuffix(s, "]"):
		host = s[1 : len(s)-1]
	case strings.HasPrefix(s, "[") || strings.Count(s, ":") == 1:
		if host, number, err = net.SplitHostPort(s); err != nil {
			return "", 0, fmt.Errorf("%q: want a server as HOST or HOST:PORT", s)
		}
		n, err := strconv.ParseUint(number, 10, 16)
		if err != nil || n == 0 {
			return "", 0, fmt.Errorf("%q: port %q: want a port number from 1 to 65535", s, number)
		}
		port = uint32(n)
	}
	address, _, _ := strings.Cut(host, "%")
	if host == "" || strings.ContainsAny(host, "[]") || strings.Contains(host, ":") && net.ParseIP(address) == nil {
		return "", 0, fmt.Errorf("%q: want the name or address of a server, as HOST or HOST:PORT", s)
	}
	return host, port, nil
}
