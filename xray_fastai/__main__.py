from xray_fastai.cli.main import app

if __name__ == "__main__":
    app(prog_name="xray-fastai")
