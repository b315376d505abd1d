package vsphere

import (
	"crypto/tls"
	"errors"
	"net/url"
	"strconv"
	"testing"

	"github.com/vmware/govmomi/simulator"

	"github.com/vddkcp/vddkcp/internal/secret"
)

func TestConnect(t *testing.T) {
	model := simulator.VPX()
	defer model.Remove()
	if err := model.Create(); err != nil {
		t.Fatal(err)
	}
	model.Service.TLS = new(tls.Config)
	model.Service.Listen = &url.URL{User: url.UserPassword("backup", "right")}
	server := model.Service.NewServer()
	defer server.Close()
	port, err := strconv.Atoi(server.URL.Port())
	if err != nil {
		t.Fatal(err)
	}
	o := Options{
		Server: server.URL.Hostname(), Port: uint32(port), User: "backup", Password: secret.New("right"),
		Thumbprint: server.CertificateInfo().ThumbprintSHA256,
	}
	s, err := Connect(t.Context(), o)
	if err != nil {
		t.Fatal(err)
	}
	if a := s.About(); !a.VCenter || a.InstanceUUID == "" {
		t.Errorf("%+v", a)
	}
	cookie, err := s.Cookie(t.Context())
	if err != nil || cookie.Reveal() == "" {
		t.Error(err)
	}
	if err := errors.Join(s.Close(), s.Close()); err != nil {
		t.Error(err)
	}
	o.Password = secret.New("wrong")
	if _, err := Connect(t.Context(), o); !errors.As(err, new(*LoginError)) {
		t.Error(err)
	}
}
